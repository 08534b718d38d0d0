"""Data sets as rows in blocks: Parquet, class folders, digits."""
