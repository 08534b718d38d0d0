"""Preparation of a data set: shards made from archives, class folders or Parquet files."""
