# A Valkey on EC2 as the parameter store of SMLT: private network, TLS, password in Secrets Manager.

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
  default     = "c6gn.large"
  description = "The store's machine (arm64). Its network is what matters; it holds the encoded gradients of all workers"
  validation {
    condition     = contains(keys(local.prices), var.node_type)
    error_message = "One of the types in local.prices."
  }
}

locals {
  prices = {
    @@PRICES@@
  }
  secrets   = "password_secret=aws-secretsmanager://${aws_secretsmanager_secret.secret.name}%3Fkey=password&ssl_ca_secret=aws-secretsmanager://${aws_secretsmanager_secret.secret.name}%3Fkey=ca"
  store_url = "rediss://${aws_instance.store.private_ip}:6379?${local.secrets}"
}

data "aws_ssm_parameter" "image" {
  name = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-arm64"
}

resource "aws_iam_role" "role" {
  name_prefix = "${var.name}-"
  assume_role_policy = jsonencode({
    Version   = "2012-10-17"
    Statement = [{ Effect = "Allow", Principal = { Service = "ec2.amazonaws.com" }, Action = "sts:AssumeRole" }]
  })
}

resource "aws_iam_role_policy" "secret" {
  name = "secret"
  role = aws_iam_role.role.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect   = "Allow"
      Action   = ["secretsmanager:GetSecretValue", "secretsmanager:PutSecretValue"]
      Resource = aws_secretsmanager_secret.secret.arn
    }]
  })
}

resource "aws_iam_instance_profile" "profile" {
  name_prefix = "${var.name}-"
  role        = aws_iam_role.role.name
}

# The way in for your machine, free of charge: ssh through it, to the store's port.
resource "aws_security_group" "connect_group" {
  name_prefix = "${var.name}-connect-"
  description = "SMLT connect endpoint - ssh to the store"
  vpc_id      = aws_vpc.vpc.id
  egress {
    protocol    = "tcp"
    from_port   = 22
    to_port     = 22
    cidr_blocks = [var.vpc_cidr]
    description = "ssh"
  }
}

resource "aws_vpc_security_group_ingress_rule" "store_from_connect" {
  security_group_id            = aws_security_group.store_group.id
  ip_protocol                  = "tcp"
  from_port                    = 22
  to_port                      = 22
  referenced_security_group_id = aws_security_group.connect_group.id
}

resource "aws_ec2_instance_connect_endpoint" "connect_endpoint" {
  subnet_id          = aws_subnet.subnet.id
  security_group_ids = [aws_security_group.connect_group.id]
  preserve_client_ip = false
}

# Terraform does not wait until the store answers; its script writes to /var/log/cloud-init-output.log.
resource "aws_instance" "store" {
  depends_on = [
    aws_vpc_endpoint.s3_endpoint, aws_vpc_endpoint.secrets_endpoint, aws_route_table_association.subnet_routes,
    aws_secretsmanager_secret_version.secret, aws_iam_role_policy.secret, aws_vpc_security_group_egress_rule.store_out,
  ]
  ami                    = data.aws_ssm_parameter.image.value
  instance_type          = var.node_type
  subnet_id              = aws_subnet.subnet.id
  vpc_security_group_ids = [aws_security_group.store_group.id]
  iam_instance_profile   = aws_iam_instance_profile.profile.name
  metadata_options {
    http_tokens = "required"
  }
  root_block_device {
    volume_size           = 8
    volume_type           = "gp3"
    encrypted             = true
    delete_on_termination = true
  }
  tags = { Name = "${var.name}-store", "smlt:managed" = "smlt" }
  lifecycle {
    ignore_changes = [ami]
  }
  user_data = <<-EOT
    #!/bin/bash
    REGION='${data.aws_region.here.region}' SECRET='${aws_secretsmanager_secret.secret.arn}' READY_URL=''
    @@SCRIPT@@
  EOT
}

output "store_url" {
  description = "The store as functions reach it. It names the secret and holds none"
  value       = local.store_url
}

output "client_store_url" {
  description = "The store as your machine reaches it, while the tunnel is open"
  value       = "rediss://localhost:6379?${local.secrets}"
}

output "tunnel" {
  description = "Opens the tunnel"
  value       = "aws ec2-instance-connect ssh --instance-id ${aws_instance.store.id} --connection-type eice --local-forwarding 6379:localhost:6379"
}

output "hourly_price" {
  description = "USD an hour while it stands"
  value       = "${local.prices[var.node_type]} for the node, @@ENDPOINT_HOUR@@ for the Secrets Manager endpoint; @@PRICES_OF@@"
}

output "deploy_arguments" {
  description = "The arguments for smlt deploy"
  value       = "--store '${local.store_url}' --subnet ${aws_subnet.subnet.id} --security-group ${aws_security_group.function_group.id}"
}
