"""Write the student of a run for other programs and devices: ONNX, torch.export, int8, a model of the Hugging Face hub.

python jobs/export.py runs/NAME
python jobs/export.py s3://bucket/runs/NAME --normalize true --push-to ORG/NAME
python jobs/export.py --network mobilenet_v2 --weights weights.safetensors --data.root DIR
"""

import sys

from mimkd_ray.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
