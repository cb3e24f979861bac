"""The files of cluster/: each is what its reader expects, they agree with each other, and the jobs fit into them."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kuberay
import psutil
import pytest
import throwaway
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import dede_ray
from dede_ray.data.passes import PassResources
from dede_ray.runtime.config import load
from dede_ray.scan.score import ScoreConfig
from dede_ray.training.clip import TrainConfig
from dede_ray.training.loop import check_workers

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CLOUDS = ["aws.yaml", "gcp.yaml"]
MANIFESTS = ["raycluster.yaml", "rayjob_score.yaml", "rayjob_train.yaml"]
PORTS = {"--port": 6379, "--dashboard-port": 8265, "--ray-client-server-port": 10001, "--metrics-export-port": 8080}
NAMES = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def pinned(package: str) -> str:
    """The version of a package that is tested."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert found, package
    return found[1]


def ray_clusters() -> dict[str, Any]:
    """Every RayCluster spec of the manifests."""
    specs = {name: read(name)["spec"] for name in MANIFESTS}
    return {name: spec.get("rayClusterSpec", spec) for name, spec in specs.items()}


def pods(cluster: Any) -> list[Any]:
    """The pod specs of a RayCluster spec: the head's, then the workers'."""
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def worker_shapes() -> dict[str, dict[str, float]]:
    """CPUs and GPUs of every kind of worker of every cluster file, by `file: kind`."""
    shapes = {}
    for name in CLOUDS:
        config = read(name)
        for kind, node in config["available_node_types"].items():
            if kind != config["head_node_type"]:
                shapes[f"{name}: {kind}"] = node["resources"]
    for name, cluster in ray_clusters().items():
        for group in cluster["workerGroupSpecs"]:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            gpus = {"GPU": int(limits["nvidia.com/gpu"])} if "nvidia.com/gpu" in limits else {}
            shapes[f"{name}: {group['groupName']}"] = {"CPU": int(limits["cpu"]), **gpus}
    return shapes


# ------------------------------------------------------------------------------------------------ ray up


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_up_takes_the_file(name):
    validate_config(prepare_config(read(name)))


def test_ray_up_refuses_a_planted_typo():
    config = read("aws.yaml")
    config["available_node_types"]["gpu_worker"]["max_worker"] = 8
    with pytest.raises(Exception, match="max_worker"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_come_and_go_on_spot_machines_and_the_head_computes_nothing(name):
    config = read(name)
    head = config["head_node_type"]
    assert config["available_node_types"][head]["resources"] == {"CPU": 0}
    assert config["idle_timeout_minutes"] > 0
    workers = {kind: node for kind, node in config["available_node_types"].items() if kind != head}
    assert {"GPU" in node["resources"] for node in workers.values()} == {True, False}, "one pool decodes, one scores"
    for node in workers.values():
        assert 0 <= node["min_workers"] < node["max_workers"] <= config["max_workers"]
        own = node["node_config"]
        market = (
            own.get("InstanceMarketOptions", {}).get("MarketType") or own["scheduling"]["provisioningModel"].lower()
        )
        assert market == "spot"


@pytest.mark.parametrize("name", CLOUDS)
def test_machines_install_nothing_but_run_the_image(name):
    """Ray fills in setup commands of its own where a file has none."""
    prepared = prepare_config(read(name))
    for kind in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[kind] == []
    for node in prepared["available_node_types"].values():
        assert not node.get("worker_setup_commands")


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_listens_on_rays_own_ports_and_workers_find_it(name):
    config = read(name)
    start = " ".join(config["head_start_ray_commands"])
    for option, port in PORTS.items():
        assert f"{option}={port} " in start
    assert "--num-cpus=0 --num-gpus=0" in start
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in start
    assert f"--address=$RAY_HEAD_IP:{PORTS['--port']} " in " ".join(config["worker_start_ray_commands"])


# ------------------------------------------------------------------------------------------------ KubeRay


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_takes_the_manifest(name):
    manifest = read(name)
    jsonschema.validate(manifest, kuberay.SCHEMAS[manifest["kind"]])


@pytest.mark.parametrize(
    ("place", "field", "typo"),
    [
        ((), "autoscalerOptions", "autoscalerOption"),
        (("workerGroupSpecs", 1), "maxReplicas", "maxReplica"),
        (("headGroupSpec", "template", "spec"), "restartPolicy", "restartPolicies"),
        (("workerGroupSpecs", 0, "template", "spec"), "terminationGracePeriodSeconds", "terminationGracePeriod"),
        (("workerGroupSpecs", 1, "template", "spec", "containers", 0), "volumeMounts", "volumeMount"),
    ],
)
def test_a_planted_typo_is_caught(place, field, typo):
    manifest = copy.deepcopy(read("raycluster.yaml"))
    inner = manifest["spec"]
    for step in place:
        inner = inner[step]
    inner[typo] = inner.pop(field)
    with pytest.raises(jsonschema.ValidationError, match=typo):
        jsonschema.validate(manifest, kuberay.SCHEMAS["RayCluster"])


def test_the_jobs_clusters_are_the_cluster_that_stays():
    one, *others = ray_clusters().values()
    for other in others:
        assert other == one


def test_a_pod_that_must_go_has_time_to_drain():
    cluster = ray_clusters()["raycluster.yaml"]
    for pod in pods(cluster)[1:]:
        environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
        drain_s = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert pod["terminationGracePeriodSeconds"] >= drain_s + 30


def test_pools_of_pods_come_and_go_and_the_head_computes_nothing():
    cluster = ray_clusters()["raycluster.yaml"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    gpu = pods(cluster)[-1]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in gpu["tolerations"]
    for pod in pods(cluster):
        [container] = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    ports = {port["name"]: port["containerPort"] for port in pods(cluster)[0]["containers"][0]["ports"]}
    assert ports == NAMES


@pytest.mark.parametrize("name", MANIFESTS[1:])
def test_a_ray_job_is_tried_again_and_cleaned_up(name):
    spec = read(name)["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] > 0
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}


# ------------------------------------------------------------------------------------------------ agreement


def test_one_image_and_one_ray_everywhere():
    version = pinned("ray")
    images = {read(name)["docker"]["image"] for name in CLOUDS}
    for cluster in ray_clusters().values():
        assert cluster["rayVersion"] == version
        images |= {container["image"] for pod in pods(cluster) for container in pod["containers"]}
    [image] = images
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"--tag {image} ." in dockerfile
    assert f"FROM rayproject/ray:{version}-py311\n" in dockerfile
    assert f"ray.__version__ == '{version}'" in dockerfile
    project = (ROOT / "pyproject.toml").read_text()
    major, minor, _ = version.split(".")
    assert f"ray[data,default,train]>={major}.{minor},<{major}.{int(minor) + 1}" in project
    assert image.endswith(":" + dede_ray.__version__)


@pytest.mark.parametrize(
    "path", [*sorted(CLUSTER.iterdir()), ROOT / "README.md", ROOT / "docs/cluster.md"], ids=lambda path: path.name
)
def test_commands_name_jobs_and_configs_that_exist(path):
    for job, config in re.findall(r"(?:python jobs/|dede-ray )(\w+)(?:\.py)? configs/([\w/]+\.yaml)", path.read_text()):
        assert (ROOT / "jobs" / f"{job}.py").is_file()
        assert (ROOT / "configs" / config).is_file()


def test_the_manifests_run_the_cluster_configs():
    entrypoints = [read(name)["spec"]["entrypoint"] for name in MANIFESTS[1:]]
    commands = [
        "python jobs/score.py configs/cluster/score.yaml",
        "python jobs/train_clip.py configs/cluster/train_clip.yaml",
    ]
    assert entrypoints == [f"cd /home/ray/dede_ray && {command}" for command in commands]
    assert "WORKDIR /home/ray/dede_ray\n" in (CLUSTER / "Dockerfile").read_text()


def score_config() -> ScoreConfig:
    return load(ScoreConfig, [str(ROOT / "configs/cluster/score.yaml")])


def train_config() -> TrainConfig:
    return load(TrainConfig, [str(ROOT / "configs/cluster/train_clip.yaml")])


def test_an_actor_and_a_training_worker_fit_on_every_gpu_machine_and_a_reader_on_every_machine():
    train = train_config()
    score, embedding = score_config().resources.on({}), train.embedding.on({})
    readers = max(score.decode_cpus, embedding.decode_cpus, train.workers.read_cpus)
    cpus = max(score.cpus_per_actor, embedding.cpus_per_actor, train.workers.cpus_per_worker)
    gpus = max(score.gpus_per_actor, embedding.gpus_per_actor, train.workers.gpus_per_worker)
    for name, shape in worker_shapes().items():
        assert shape["CPU"] >= readers, name
        if "GPU" in shape:
            assert shape["CPU"] >= cpus, name
            assert shape["GPU"] >= gpus, name


def test_the_clusters_can_grow_to_what_the_configs_ask_for():
    train, score = train_config(), score_config()
    asked = max(score.resources.max_actors or 0, train.embedding.max_actors or 0, train.workers.num_workers)
    for name in CLOUDS:
        assert read(name)["available_node_types"]["gpu_worker"]["max_workers"] >= asked
    gpu_pool = ray_clusters()["raycluster.yaml"]["workerGroupSpecs"][-1]
    assert gpu_pool["maxReplicas"] >= asked


def test_an_empty_cluster_is_not_refused_by_the_cluster_configs():
    for resources in (score_config().resources, train_config().embedding):
        asked: PassResources = resources.on({})
        assert (asked.min_actors, asked.max_actors) == (2, 8)


def test_the_training_config_divides_among_any_number_of_its_workers():
    train = train_config()
    assert train.clip is not None
    assert train.decoder is not None
    check_workers(train.lanes, train.clip.batch_size, train.clip.accumulation, train.workers)
    check_workers(train.lanes, train.decoder.resolved().batch_size, 1, train.workers)


def test_the_cluster_configs_say_that_no_cloud_has_run_them():
    """A config for a cluster says that it was never run, until it was."""
    for name in ("score.yaml", "train_clip.yaml"):
        assert "Not run on a cloud so far" in (ROOT / "configs" / "cluster" / name).read_text().replace("\n# ", " ")


def test_what_one_job_writes_is_what_the_next_one_reads():
    train, score = train_config(), score_config()
    assert score.victim.path == f"{train.output}/clip"
    assert score.detectors[0].decoder == f"{train.output}/decoder"
    assert score.calibration in (train.clip.shards if train.clip else ())


def test_paths_of_the_cluster_configs_are_seen_by_all_machines():
    """/shared is a volume of every container; everything else is a URL."""
    texts = [(ROOT / "configs" / "cluster" / name).read_text() for name in ("score.yaml", "train_clip.yaml")]
    settings = [yaml.safe_load(text) for text in texts]
    for text in (settings[0]["output"], settings[1]["output"], settings[0]["victim"]["path"], settings[0]["shards"]):
        assert text.startswith(("/shared/", "s3://my-bucket/"))
    for name in CLOUDS:
        config = read(name)
        assert "--volume /shared:/shared" in config["docker"]["run_options"]
        assert any("mount -t nfs" in command for command in config["initialization_commands"])
    for pod in pods(ray_clusters()["raycluster.yaml"]):
        assert [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]] == ["/shared"]


# ------------------------------------------------------------------------------------------------ Dockerfile


def instructions() -> list[tuple[str, str]]:
    """Instruction and argument of every line of the Dockerfile, continued lines joined."""
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word.upper(), argument) for word, argument in lines]


def test_the_image_has_a_pinned_base_the_tested_set_and_no_root():
    steps = instructions()
    [base] = [argument for word, argument in steps if word == "FROM"]
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base)
    installs = [argument for word, argument in steps if word == "RUN" and "pip install" in argument]
    assert installs
    for argument in installs:
        assert "--constraint constraints.txt" in argument
    assert [argument for word, argument in steps if word == "USER"] == ["ray"]
    assert steps[-1] == ("USER", "ray")


def test_what_the_image_copies_exists_and_docker_may_see_it():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    copied = set()
    for word, argument in instructions():
        if word == "COPY":
            *sources, _ = [part for part in argument.split() if not part.startswith("--")]
            copied |= set(sources)
    assert copied >= {"pyproject.toml", "constraints.txt", "dede_ray", "jobs", "configs"}
    for source in copied:
        assert (ROOT / source).exists(), source
    assert {line[1:] for line in ignored if line.startswith("!")} == copied


def test_the_project_can_be_built_from_what_the_image_copies():
    """pyproject.toml names further files and folders, which must be there when pip builds the project."""
    project, steps = (ROOT / "pyproject.toml").read_text(), instructions()
    build = next(i for i, (word, argument) in enumerate(steps) if word == "RUN" and "pip install" in argument)
    copied = {part for word, argument in steps[:build] if word == "COPY" for part in argument.split()}
    [folders] = re.findall(r"^package-dir = \{(.+)\}$", project, re.M)
    assert copied >= {*re.findall(r'(?:readme = |license-files = \[)"([^"]+)"', project)}
    assert copied >= {*re.findall(r'= "([^"]+)"', folders)}


# ------------------------------------------------------------------------------------------------ runtime_env.yaml


def test_a_submission_takes_the_code_along_and_neither_data_nor_results():
    from ray.runtime_env import RuntimeEnv

    runtime_env = read("runtime_env.yaml")
    RuntimeEnv(**runtime_env)
    assert {"/.git", "/runs", "/.venv"} <= set(runtime_env["excludes"])
    for name in ("jobs", "configs", "dede_ray", "cluster"):
        assert f"/{name}" not in runtime_env["excludes"]
    assert all(isinstance(value, str) for value in runtime_env["env_vars"].values())


# ------------------------------------------------------------------------------------------------ Slurm

# Stand-ins for Slurm's commands: a "node" is this machine again, where a second Ray needs a port of its own.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$FAKE_LOG"
while [[ $1 == --* ]]; do shift; done
[[ "$*" == *--address=* ]] && set -- "$@" --node-ip-address=127.0.0.1 --dashboard-agent-listen-port="$FAKE_AGENT_PORT"
[[ "$*" == *"ray start"* ]] && set -- "$@" --object-store-memory=100000000 --include-log-monitor=false
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$FAKE_LOG"
[[ $1 == show ]] && printf '%s\\n' ${3//,/ }
exit 0
"""
HOSTNAME = """#!/usr/bin/env bash
echo "::1 127.0.0.1"
"""
ASK = "import ray; ray.init(); print('nodes', len(ray.nodes()), 'cpus', ray.cluster_resources()['CPU'])"


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start cluster/slurm.sh as Slurm would on two nodes of one CPU; whatever it started is ended with the test."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("hostname", HOSTNAME)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    gcs, dashboard, client, metrics, agent = throwaway.free_ports(5)
    temporary = tempfile.mkdtemp(prefix="s", dir="/tmp")
    python = Path(sys.executable).parent
    variables = {
        "PATH": f"{tmp_path / 'bin'}:{python}:{os.environ['PATH']}", "FAKE_LOG": str(tmp_path / "log"),
        "FAKE_AGENT_PORT": str(agent), "SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "one,two",
        "SLURM_CPUS_ON_NODE": "1", "RAY_PORT": str(gcs), "RAY_DASHBOARD_PORT": str(dashboard),
        "RAY_CLIENT_PORT": str(client), "RAY_METRICS_PORT": str(metrics), "RAY_TEMPORARY": temporary,
    }  # fmt: skip
    started: list[subprocess.Popen[str]] = []

    def start(*command: str, **more: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        started.append(
            subprocess.Popen(
                ["bash", str(CLUSTER / "slurm.sh"), *command], env=environment | variables | more,
                stdout=(tmp_path / "stdout").open("w"), stderr=(tmp_path / "stderr").open("w"), text=True,
                start_new_session=True,
            )
        )  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        throwaway.end(process)  # type: ignore[arg-type]
    left = [
        one for one in psutil.process_iter(["cmdline"]) if any(temporary in part for part in one.info["cmdline"] or ())
    ]
    for one in left:
        one.kill()
    shutil.rmtree(temporary, ignore_errors=True)


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)
    shellcheck = shutil.which("shellcheck")
    if shellcheck:
        subprocess.run([shellcheck, str(CLUSTER / "slurm.sh")], check=True)


def test_the_slurm_script_without_a_command_says_how_it_is_used(slurm, tmp_path):
    assert slurm().wait(30) == 2
    assert "usage: sbatch cluster/slurm.sh" in (tmp_path / "stderr").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("code", [0, 3])
def test_slurm_starts_ray_on_all_nodes_runs_the_command_and_ends_as_it_ended(slurm, tmp_path, code):
    process = slurm("python", "-c", f"{ASK}; raise SystemExit({code})")
    assert process.wait(180) == code, (tmp_path / "stderr").read_text()
    assert "nodes 2 cpus 2.0" in (tmp_path / "stdout").read_text()
    log = (tmp_path / "log").read_text()
    head, workers = [line for line in log.splitlines() if "ray start" in line]
    assert "--nodelist=one " in head
    assert "--head --node-ip-address=127.0.0.1" in head
    assert "--nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=two " in workers
    assert "requeue" not in log


@pytest.mark.slow
def test_slurm_puts_a_job_whose_time_is_up_back_into_the_queue(slurm, tmp_path):
    process = slurm(
        "python", "-c", "import time; print('working', flush=True); time.sleep(600)",
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="3",
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while "working" not in (tmp_path / "stdout").read_text():
        assert process.poll() is None, (tmp_path / "stderr").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.5)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0, (tmp_path / "stderr").read_text()
    assert "draining for at most 3 s" in (tmp_path / "stderr").read_text()
    assert (tmp_path / "log").read_text().splitlines()[-1] == "scontrol requeue 1234"
