"""Making a prepared set of shards from archives, class folders or Parquet files."""
