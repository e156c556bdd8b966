"""The stores: parameters and metadata in Redis or Valkey, code and data in an object store."""
