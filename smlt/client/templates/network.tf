variable "name" {
  type        = string
  default     = "smlt-store"
  description = "Begins the names of what is made"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{0,30}$", var.name))
    error_message = "1 to 31 small letters, digits and hyphens."
  }
}

variable "vpc_cidr" {
  type        = string
  default     = "10.83.0.0/16"
  description = "The network's addresses; two subnets of 254 are cut from it"
  validation {
    condition     = can(regex("^(10|172|192)\\.[0-9]{1,3}\\.[0-9]{1,3}\\.0/(1[6-9]|2[0-2])$", var.vpc_cidr))
    error_message = "A private network from /16 to /22."
  }
}

data "aws_region" "here" {}

data "aws_availability_zones" "here" {
  state = "available"
}

resource "aws_vpc" "vpc" {
  cidr_block           = var.vpc_cidr
  enable_dns_support   = true
  enable_dns_hostnames = true
  tags                 = { Name = var.name, "smlt:managed" = "smlt" }
}

# Private: no internet gateway, no NAT. Functions reach S3 and Secrets Manager by the endpoints, nothing else.
resource "aws_subnet" "subnet" {
  vpc_id                  = aws_vpc.vpc.id
  cidr_block              = cidrsubnet(var.vpc_cidr, 24 - tonumber(split("/", var.vpc_cidr)[1]), 0)
  availability_zone       = data.aws_availability_zones.here.names[0]
  map_public_ip_on_launch = false
}

resource "aws_subnet" "other_subnet" {
  vpc_id                  = aws_vpc.vpc.id
  cidr_block              = cidrsubnet(var.vpc_cidr, 24 - tonumber(split("/", var.vpc_cidr)[1]), 1)
  availability_zone       = data.aws_availability_zones.here.names[1]
  map_public_ip_on_launch = false
}

resource "aws_route_table" "routes" {
  vpc_id = aws_vpc.vpc.id
}

resource "aws_route_table_association" "subnet_routes" {
  subnet_id      = aws_subnet.subnet.id
  route_table_id = aws_route_table.routes.id
}

resource "aws_route_table_association" "other_subnet_routes" {
  subnet_id      = aws_subnet.other_subnet.id
  route_table_id = aws_route_table.routes.id
}

# Free of charge.
resource "aws_vpc_endpoint" "s3_endpoint" {
  vpc_endpoint_type = "Gateway"
  vpc_id            = aws_vpc.vpc.id
  service_name      = "com.amazonaws.${data.aws_region.here.region}.s3"
  route_table_ids   = [aws_route_table.routes.id]
}

# Paid by the hour: see hourly_price. In the store's zone alone; the other subnet reaches it too.
resource "aws_vpc_endpoint" "secrets_endpoint" {
  vpc_endpoint_type   = "Interface"
  vpc_id              = aws_vpc.vpc.id
  service_name        = "com.amazonaws.${data.aws_region.here.region}.secretsmanager"
  subnet_ids          = [aws_subnet.subnet.id]
  security_group_ids  = [aws_security_group.endpoint_group.id]
  private_dns_enabled = true
}

resource "aws_security_group" "function_group" {
  name_prefix = "${var.name}-functions-"
  description = "SMLT functions - to the store, to S3 and to Secrets Manager"
  vpc_id      = aws_vpc.vpc.id
  egress {
    protocol    = "tcp"
    from_port   = 6379
    to_port     = 6379
    cidr_blocks = [var.vpc_cidr]
    description = "the store"
  }
  egress {
    protocol    = "tcp"
    from_port   = 443
    to_port     = 443
    cidr_blocks = ["0.0.0.0/0"]
    description = "S3 and Secrets Manager"
  }
}

# Its rules stand alone, in and out: Terraform does not mix them with such as stand within.
resource "aws_security_group" "store_group" {
  name_prefix = "${var.name}-store-"
  description = "SMLT store - from the functions alone"
  vpc_id      = aws_vpc.vpc.id
}

resource "aws_vpc_security_group_egress_rule" "store_out" {
  security_group_id = aws_security_group.store_group.id
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
  cidr_ipv4         = "0.0.0.0/0"
  description       = "S3 and Secrets Manager"
}

resource "aws_vpc_security_group_ingress_rule" "store_from_functions" {
  security_group_id            = aws_security_group.store_group.id
  ip_protocol                  = "tcp"
  from_port                    = 6379
  to_port                      = 6379
  referenced_security_group_id = aws_security_group.function_group.id
}

resource "aws_security_group" "endpoint_group" {
  name_prefix = "${var.name}-endpoint-"
  description = "SMLT endpoints - from the network"
  vpc_id      = aws_vpc.vpc.id
  ingress {
    protocol    = "tcp"
    from_port   = 443
    to_port     = 443
    cidr_blocks = [var.vpc_cidr]
    description = "the network"
  }
}

# Ephemeral, written and not kept: the password does not come into Terraform's state.
ephemeral "aws_secretsmanager_random_password" "password" {
  password_length     = 48
  exclude_punctuation = true
}

resource "aws_secretsmanager_secret" "secret" {
  name                    = "${var.name}-store"
  description             = "SMLT's parameter store - its password and its authority's certificate"
  recovery_window_in_days = 0
}

resource "aws_secretsmanager_secret_version" "secret" {
  secret_id                = aws_secretsmanager_secret.secret.id
  secret_string_wo         = jsonencode({ password = ephemeral.aws_secretsmanager_random_password.password.random_password, ca = "" })
  secret_string_wo_version = 1
}

output "subnet_id" {
  description = "The store's subnet. Functions in it have the shortest way, and no traffic between zones"
  value       = aws_subnet.subnet.id
}

output "other_subnet_id" {
  description = "The subnet of the other zone"
  value       = aws_subnet.other_subnet.id
}

output "security_group_id" {
  description = "The functions' security group"
  value       = aws_security_group.function_group.id
}
