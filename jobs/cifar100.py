"""Distil on CIFAR-100 by the standard protocol.

python jobs/cifar100.py resnet32x4_resnet8x4 --data.root DIR --teacher.train true
python jobs/cifar100.py resnet32x4_resnet8x4 --data.root DIR --teacher.weights teacher.safetensors
"""

import sys

from mimkd_ray.cli.command_line import main
from mimkd_ray.recipes import CIFAR_RECIPES

if __name__ == "__main__":
    sys.exit(main(CIFAR_RECIPES, default="resnet32x4_resnet8x4"))
