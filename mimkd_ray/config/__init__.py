"""The fields of a run, one file a section; every section can be imported from here. config.py has the whole config."""

from mimkd_ray.config.cache import CacheConfig
from mimkd_ray.config.compare import CompareConfig
from mimkd_ray.config.config import Config
from mimkd_ray.config.critic import CriticConfig
from mimkd_ray.config.data import DataConfig
from mimkd_ray.config.jobs.doctor import DoctorConfig
from mimkd_ray.config.jobs.export import ExportConfig
from mimkd_ray.config.jobs.prepare import PrepareConfig
from mimkd_ray.config.jobs.search import SearchConfig, SearchJob
from mimkd_ray.config.launch import LaunchConfig
from mimkd_ray.config.loss import LossConfig
from mimkd_ray.config.mix import MixConfig
from mimkd_ray.config.model import ModelConfig
from mimkd_ray.config.optim import OptimConfig
from mimkd_ray.config.run import RunConfig
from mimkd_ray.config.storage import StorageConfig
from mimkd_ray.config.teacher import TeacherConfig
from mimkd_ray.config.train import TrainConfig

__all__ = [
    "CacheConfig",
    "CompareConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "DoctorConfig",
    "ExportConfig",
    "LaunchConfig",
    "LossConfig",
    "MixConfig",
    "ModelConfig",
    "OptimConfig",
    "PrepareConfig",
    "RunConfig",
    "SearchConfig",
    "SearchJob",
    "StorageConfig",
    "TeacherConfig",
    "TrainConfig",
]
