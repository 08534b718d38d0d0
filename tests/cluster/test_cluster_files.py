"""The files in cluster/: launcher files by Ray's own validation, KubeRay files by a strict schema, and rules of
ours."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from kuberay_schema import schema_of
from ray.autoscaler._private.util import prepare_config, validate_config

from mimkd_ray.cli.command_line import parse
from mimkd_ray.recipes import IMAGENET_RECIPES

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws.yaml", "gcp.yaml")
KUBERAY = ("kuberay-rayjob.yaml", "kuberay-raycluster.yaml")
TUNED = {
    "RAY_JOB_STOP_WAIT_TIME_S",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S",
    "RAY_health_check_period_ms",
    "RAY_health_check_timeout_ms",
    "RAY_health_check_failure_threshold",
}
"""Settings that make recovery from a lost node fast."""


def launcher(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / name).read_text())


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def cluster_spec(name: str) -> dict[str, Any]:
    first = documents(name)[0]
    return first["spec"]["rayClusterSpec"] if first["kind"] == "RayJob" else first["spec"]


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Every pod's spec in a document."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def variables(name: str) -> dict[str, str]:
    """Ray's environment variables in a file."""
    if name in LAUNCHER:
        options = launcher(name)["docker"]["run_options"]
        return dict(option.removeprefix("-e ").split("=") for option in options if option.startswith("-e "))
    head = cluster_spec(name)["headGroupSpec"]["template"]["spec"]["containers"][0]
    return {each["name"]: each["value"] for each in head["env"]}


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_accepts_the_launcher_files(name: str) -> None:
    config = prepare_config(launcher(name))
    validate_config(config)
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert {type_["min_workers"] for type_ in types.values()} == {0}
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"]["priority"]
    assert types["gpu_spot"]["resources"] == types["gpu_on_demand"]["resources"]
    assert "GPU" not in types["cpu_spot"]["resources"]
    assert all("--num-cpus=0" in command for command in config["head_start_ray_commands"] if "start" in command)
    # Ray's defaults: pip of another Ray, and of what the head's autoscaler imports.
    assert [config[f"{which}setup_commands"] for which in ("", "head_", "worker_")] == [[], [], []]
    assert variables(name)["NVIDIA_VISIBLE_DEVICES"] == "all", "the image is none of CUDA's, which set it"


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_refuses_a_typo_in_them(name: str) -> None:
    config = launcher(name)
    config["available_node_types"]["gpu_spot"]["max_worker"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(config))


def test_aws_is_closed_and_encrypted() -> None:
    config = launcher("aws.yaml")
    assert config["provider"]["use_internal_ips"] is True
    for name, type_ in config["available_node_types"].items():
        node = type_["node_config"]
        assert node["SecurityGroupIds"], "else the launcher makes a group that opens port 22 to the world"
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] is True for disk in node["BlockDeviceMappings"])
        profile = node["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        assert profile == ("mimkd-ray-head" if name == "head" else "mimkd-ray-node")
        assert ("InstanceMarketOptions" in node) == name.endswith("_spot")


def test_gcp_is_closed() -> None:
    config = launcher("gcp.yaml")
    assert config["provider"]["use_internal_ips"] is True
    for name, type_ in config["available_node_types"].items():
        node = type_["node_config"]
        assert all("accessConfigs" not in network for network in node["networkInterfaces"]), "no public address"
        account = node["serviceAccounts"][0]["email"].partition("@")[0]
        assert account == ("mimkd-ray-head" if name == "head" else "mimkd-ray-node")
        assert ({"preemptible": True} in node.get("scheduling", [])) == name.endswith("_spot")


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_fit_the_schemas(name: str) -> None:
    for document in documents(name):
        jsonschema.validate(document, schema_of(document))


@pytest.mark.parametrize("name", KUBERAY)
@pytest.mark.parametrize(
    ("path", "wrong"),
    [(("workerGroupSpecs", 0), "minReplica"), (("headGroupSpec", "template", "spec"), "volume"), ((), "authOption")],
)
def test_a_typo_in_them_is_found(name: str, path: tuple[str | int, ...], wrong: str) -> None:
    document = copy.deepcopy(documents(name)[0])
    place = document["spec"].get("rayClusterSpec", document["spec"])
    for part in path:
        place = place[part]
    place[wrong] = place.pop(f"{wrong}s")
    with pytest.raises(jsonschema.ValidationError, match=wrong):
        jsonschema.validate(document, schema_of(document))


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_confined(name: str) -> None:
    found = [pod for document in documents(name) for pod in pods(document)]
    assert len(found) >= 5
    for pod in found:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", container["image"]), "a full tag"
            assert container["resources"]["limits"]["memory"]
            for each in container.get("env", []):
                assert "valueFrom" in each or not re.search("(?i)secret|token|password|key", each["name"])


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_clusters_are_as_the_readme_says(name: str) -> None:
    spec = cluster_spec(name)
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert {group["minReplicas"] for group in groups.values()} == {0}
    assert groups["gpu-spot"]["priority"] > groups["gpu-on-demand"]["priority"]
    for pod in pods(spec):
        mounts = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        assert "/dev/shm" in mounts
        assert {"medium": "Memory"}.items() <= pod["volumes"][0]["emptyDir"].items()
    first, *others = documents(name)
    assert first["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert first["spec"]["suspend"] is True
    (policy,) = (other for other in others if other["kind"] == "NetworkPolicy")
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    groups_templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in groups.values())]
    assert all(selected <= template["metadata"]["labels"].items() for template in groups_templates)
    assert all(rule["from"] for rule in policy["spec"]["ingress"]), "a rule without `from` admits everybody"
    assert ("gcsFaultToleranceOptions" in spec) == (first["kind"] == "RayCluster")


def test_the_rayjobs_command_is_a_valid_one() -> None:
    python, job, *arguments = shlex.split(documents("kuberay-rayjob.yaml")[0]["spec"]["entrypoint"])
    assert (python, job) == ("python", "/opt/mimkd/jobs/imagenet.py")
    config = parse(IMAGENET_RECIPES, "demo", arguments, job)
    assert config is not None
    assert config.launch.worker_range == (2, 8)


@pytest.mark.parametrize("name", [*LAUNCHER, *KUBERAY])
def test_environment_variables_are_ones_that_ray_reads(name: str) -> None:
    found = variables(name)
    assert set(found) >= TUNED
    package = Path(ray.__file__).parent
    sources = "\n".join(
        (package / part).read_text()
        for part in (
            "_common/usage/usage_constants.py",
            "dashboard/modules/job/job_supervisor.py",
            "train/v2/_internal/constants.py",
        )
    )
    server = (package / "core/src/ray/gcs/gcs_server").read_bytes()
    for variable in found.keys() - {"NVIDIA_VISIBLE_DEVICES"}:
        # Settings of Ray's C++ side are known there without the prefix.
        in_server = b"\0" + variable.removeprefix("RAY_").encode() + b"\0" in server
        assert in_server or re.search(rf"\b{variable}\b", sources), variable


def test_paths_that_the_files_name_are_there() -> None:
    text = "\n".join(path.read_text() for path in CLUSTER.iterdir() if path.suffix in (".yaml", ".md", ".json"))
    named = set(re.findall(r"(?<![\w/.-])(?:cluster|jobs|mimkd_ray|benchmarks)/[\w./-]*\w", text))
    assert {"cluster/aws.yaml", "jobs/prepare_data.py"} <= named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    copied = re.findall(r"^COPY (?:--chown=\w+ )?(.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert "constraints.txt" in sources
    allowed = set(re.findall("^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert set(sources) == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_what_travels_with_a_job_is_what_nodes_need() -> None:
    ignored = {line.rstrip("/") for line in (ROOT / ".rayignore").read_text().splitlines() if line[0] != "#"}
    assert {"tests", "benchmarks", "cluster", ".git", ".venv", "runs"} <= ignored
    assert not ignored & {"jobs", "mimkd_ray", "pyproject.toml"}


def test_no_credentials_travel_with_a_job(tmp_path: Path) -> None:
    """By git, whose patterns Ray takes; tests/cli/test_job_submit.py has Ray pack them."""
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    names = [
        ".env",
        "storage.env",
        "cluster/storage.env",
        ".netrc",
        ".aws/credentials",
        ".ssh/config",
        "a.pem",
        "id_rsa",
    ]
    wanted = ["jobs/x.py", "mimkd_ray/environment.py", "mine/env/net.py"]
    for name in (*names, *wanted):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run([git, "init", "-q", str(tmp_path)], check=True)
    listed = [git, "-C", str(tmp_path), "ls-files", "--others", f"--exclude-from={ROOT / '.rayignore'}"]
    done = subprocess.run(listed, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == sorted(wanted)


@pytest.mark.parametrize("name", ["iam-policy.json", "iam-head-policy.json"])
def test_policies_give_no_more_than_is_needed(name: str) -> None:
    policy = json.loads((CLUSTER / name).read_text())
    for statement in policy["Statement"]:
        actions, resources = (
            value if isinstance(value, list) else [value] for value in (statement["Action"], statement["Resource"])
        )
        assert statement["Effect"] == "Allow"
        assert all("*" not in action for action in actions)
        if "*" in resources:  # AWS knows no resources for these
            assert all(action.startswith("ec2:Describe") for action in actions), statement["Sid"]
    if name == "iam-policy.json":
        assert all("/mimkd/" in each["Resource"] or "Condition" in each for each in policy["Statement"])


def test_the_dockerfile_pins_and_drops_rights() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", text, re.MULTILINE)
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+", base)
    user = re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1]
    assert int(user) > 0
    assert "-c constraints.txt" in text
    assert "rm -rf /var/lib/apt/lists/*" in text
    assert not re.search(r"(?im)^(arg|env) .*(secret|token|password|access_key)", text)
    assert "http" not in re.sub("(?m)^#.*$", "", text), "no index of packages is named"


def test_the_image_has_what_rays_launcher_uses() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    (venv,) = re.findall(r"^ENV PATH=(\S+):\$PATH", text, re.MULTILINE)
    # Login shells, in which the launcher runs its commands, have another PATH than ENV's.
    assert re.search(rf'echo "PATH={venv}:\\\$PATH" > /etc/profile\.d/\w+\.sh$', text, re.MULTILINE)
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'$", text, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [name for extra in extras.split(",") for name in project["optional-dependencies"][extra]]
    providers = Path(ray.__file__).parent / "autoscaler/_private"
    for module, package, provider in (
        ("boto3", "boto3", "aws/config.py"),
        ("googleapiclient", "google-api-python-client", "gcp/config.py"),
    ):
        assert re.search(rf"^import {module}$", (providers / provider).read_text(), re.MULTILINE)
        assert any(re.match(rf"{package}[>=]", each) for each in needed), package


def test_the_dockerfile_passes_a_linter() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed on this platform")
    done = subprocess.run([linter, str(CLUSTER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
