"""The fields of a run, one file a section; every section can be imported from here. config.py has the whole config."""

from mimkd_ray.config.cache import CacheConfig as CacheConfig
from mimkd_ray.config.compare import CompareConfig as CompareConfig
from mimkd_ray.config.config import Config as Config
from mimkd_ray.config.critic import CriticConfig as CriticConfig
from mimkd_ray.config.data import DataConfig as DataConfig
from mimkd_ray.config.jobs.doctor import DoctorConfig as DoctorConfig
from mimkd_ray.config.jobs.export import ExportConfig as ExportConfig
from mimkd_ray.config.jobs.prepare import PrepareConfig as PrepareConfig
from mimkd_ray.config.jobs.search import SearchConfig as SearchConfig
from mimkd_ray.config.jobs.search import SearchJob as SearchJob
from mimkd_ray.config.launch import LaunchConfig as LaunchConfig
from mimkd_ray.config.loss import LossConfig as LossConfig
from mimkd_ray.config.mix import MixConfig as MixConfig
from mimkd_ray.config.model import ModelConfig as ModelConfig
from mimkd_ray.config.optim import OptimConfig as OptimConfig
from mimkd_ray.config.run import RunConfig as RunConfig
from mimkd_ray.config.storage import StorageConfig as StorageConfig
from mimkd_ray.config.teacher import TeacherConfig as TeacherConfig
from mimkd_ray.config.train import TrainConfig as TrainConfig
