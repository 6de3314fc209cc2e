from __future__ import annotations

from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.manifests import DEPLOY, ROOT, copied_sources, read_yaml


def test_a_cluster_sends_its_nodes_what_they_install():
    cluster = read_yaml(DEPLOY / "cluster.yaml")
    sent = {ROOT / local for local in cluster["file_mounts"].values()}
    assert [path for path in sent if not path.exists()] == []
    assert sent >= set(copied_sources())


def test_every_start_command_of_a_cluster_loads_the_environment_first():
    cluster = read_yaml(DEPLOY / "cluster.yaml")
    for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
        before, start, _ = commands[-1].partition("ray start")
        assert start
        assert "set -a; . ~/ridgewalk/deploy/serve.env; set +a;" in before


def test_ray_up_accepts_the_cluster():
    cluster = prepare_config(read_yaml(DEPLOY / "cluster.yaml"))
    validate_config(cluster)
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
