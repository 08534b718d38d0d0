"""Make a prepared data set: shuffled shards of equal blocks, from class folders, Hugging Face Parquet, or the official
ImageNet archives. It resumes after a kill. One split a call:

python jobs/prepare_data.py --source DIR --target s3://bucket/set
python jobs/prepare_data.py --source DIR --target s3://bucket/set --split val
python jobs/prepare_data.py --source DIR --target DIR2 --short-side 256
ray job submit --working-dir . -- python jobs/prepare_data.py --source s3://bucket/raw --target s3://bucket/set
"""

import sys

from mimkd_ray.cli.jobs import prepare

if __name__ == "__main__":
    sys.exit(prepare(sys.argv[1:], sys.argv[0]))
