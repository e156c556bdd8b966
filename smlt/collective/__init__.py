"""The collective: shards through the store, averaged."""
