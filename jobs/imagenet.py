"""Distil an image classifier. Without arguments: the built-in demo, on real data that ships with a dependency.

python jobs/imagenet.py
python jobs/imagenet.py r34_r18 --data.root s3://bucket/imagenet --run.root s3://bucket/runs
ray job submit --working-dir . -- python jobs/imagenet.py r34_r18 --data.root s3://bucket/imagenet
torchrun --nproc-per-node 4 jobs/imagenet.py r34_r18 --launch.backend local --data.root DIR
"""

import sys

from mimkd_ray.cli.command_line import main
from mimkd_ray.recipes import IMAGENET_RECIPES

if __name__ == "__main__":
    sys.exit(main(IMAGENET_RECIPES, default="demo"))
