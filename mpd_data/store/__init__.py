"""The shard contract on disk: schema, keys, locks, shards, rounds, writer, progress."""
