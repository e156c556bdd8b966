# ElastiCache for Valkey as the parameter store of SMLT: private network, TLS, password in Secrets Manager.
# The provider keeps ElastiCache's token in Terraform's state: keep the state encrypted, and to yourself.

terraform {
  required_version = ">= 1.11"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 6.0"
    }
  }
}

variable "node_type" {
  type        = string
  default     = "cache.m7g.large"
  description = "The store's node. Its network is what matters; it holds the encoded gradients of all workers"
  validation {
    condition     = contains(keys(local.prices), var.node_type)
    error_message = "One of the types in local.prices."
  }
}

locals {
  prices = {
    @@PRICES@@
  }
  store_url = "rediss://${aws_elasticache_replication_group.store.primary_endpoint_address}:6379?password_secret=aws-secretsmanager://${aws_secretsmanager_secret.secret.name}%3Fkey=password"
}

data "aws_secretsmanager_secret_version" "secret" {
  secret_id  = aws_secretsmanager_secret.secret.id
  depends_on = [aws_secretsmanager_secret_version.secret]
}

resource "aws_elasticache_subnet_group" "store_subnets" {
  name        = var.name
  description = "SMLT store"
  subnet_ids  = [aws_subnet.subnet.id, aws_subnet.other_subnet.id]
}

# A store that evicts what workers still need ends a run: it must refuse instead.
resource "aws_elasticache_parameter_group" "store_settings" {
  name        = var.name
  family      = "valkey8"
  description = "SMLT store"
  parameter {
    name  = "maxmemory-policy"
    value = "noeviction"
  }
}

resource "aws_elasticache_replication_group" "store" {
  replication_group_id        = var.name
  description                 = "SMLT store"
  engine                      = "valkey"
  engine_version              = "8.0"
  node_type                   = var.node_type
  num_cache_clusters          = 1
  preferred_cache_cluster_azs = [data.aws_availability_zones.here.names[0]]
  automatic_failover_enabled  = false
  multi_az_enabled            = false
  port                        = 6379
  subnet_group_name           = aws_elasticache_subnet_group.store_subnets.name
  parameter_group_name        = aws_elasticache_parameter_group.store_settings.name
  security_group_ids          = [aws_security_group.store_group.id]
  transit_encryption_enabled  = true
  transit_encryption_mode     = "required"
  at_rest_encryption_enabled  = true
  auth_token                  = jsondecode(data.aws_secretsmanager_secret_version.secret.secret_string)["password"]
  snapshot_retention_limit    = 0
  tags                        = { "smlt:managed" = "smlt" }
}

output "store_url" {
  description = "The store. It names the secret and holds none"
  value       = local.store_url
}

output "hourly_price" {
  description = "USD an hour while it stands"
  value       = "${local.prices[var.node_type]} for the node, @@ENDPOINT_HOUR@@ for the Secrets Manager endpoint; @@PRICES_OF@@"
}

output "deploy_arguments" {
  description = "The arguments for smlt deploy"
  value       = "--store '${local.store_url}' --subnet ${aws_subnet.subnet.id} --security-group ${aws_security_group.function_group.id}"
}
