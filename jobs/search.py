"""Search for the best critic, layers, bound and weights of a teacher and a student. It resumes after a kill.

python jobs/search.py
python jobs/search.py resnet32x4_resnet8x4 --data.root DIR --teacher.weights teacher.safetensors --search.epochs 20
python jobs/search.py r34_r18 --data.root s3://bucket/imagenet --data.views 8 --cache.root s3://bucket/cache \
    --search.space temperature taps weights --search.trials 200 --search.epochs 10
python jobs/cifar100.py --config runs/SEARCH/best.json
"""

import sys

from mimkd_ray.cli.jobs import search

if __name__ == "__main__":
    sys.exit(search(sys.argv[1:], sys.argv[0]))
