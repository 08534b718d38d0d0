"""Evaluate a student, a teacher or any network: accuracy, calibration, agreement, features, corruptions.

python jobs/evaluate.py runs/RUN
python jobs/evaluate.py runs/RUN --data.root OTHER_DATA --eval.corruptions true
python jobs/evaluate.py --student.name mobilenet_v2 --student.weights FILE --data.root DIR --eval.classes NAMES.txt
torchrun --nproc-per-node 4 jobs/evaluate.py s3://bucket/runs/RUN
"""

import sys

from mimkd_ray.cli.jobs import evaluate

if __name__ == "__main__":
    sys.exit(evaluate(sys.argv[1:], sys.argv[0]))
