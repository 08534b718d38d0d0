"""Compute a teacher's features once, into Parquet, for every run that distils from it. It takes the configuration of
training, and resumes after a kill. `plan` only prints the cost.

python jobs/cache_teacher.py r34_r18 --data.root DIR --data.views 8 --cache.root s3://bucket/cache
python jobs/cache_teacher.py plan r34_r18 --data.root DIR --data.views 8 --cache.root s3://bucket/cache
python jobs/cache_teacher.py ls --cache.root s3://bucket/cache
python jobs/cache_teacher.py verify --cache.root s3://bucket/cache --mend true
python jobs/cache_teacher.py gc --cache.root s3://bucket/cache --delete true
"""

import sys

from mimkd_ray.cli.jobs import cache

if __name__ == "__main__":
    sys.exit(cache(sys.argv[1:], sys.argv[0]))
