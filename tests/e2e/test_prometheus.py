"""A real Prometheus scrapes a real cluster: every query of the dashboards and every rule can be evaluated."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from support.cluster import SocksRefused, Target, in_thread, running_cluster
from support.logs import Events
from support.plumbing import free_port

ROOT = Path(__file__).parents[2]
IP = "127.1.0.1"

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus")


@contextmanager
def prometheus(directory: Path, targets: list[str]) -> Iterator[str]:
    """Run Prometheus with the rules of deploy/, and yield the address of its API."""
    settings = {
        "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms", "evaluation_interval": "500ms"},
        "rule_files": [str(ROOT / "deploy/prometheus/rules.yaml")],
        "scrape_configs": [{"job_name": "rtunnel", "static_configs": [{"targets": targets}]}],
    }
    file, address = directory / "prometheus.json", f"127.0.0.1:{free_port()}"
    file.write_text(json.dumps(settings))
    storage = f"--storage.tsdb.path={directory / 'tsdb'}"
    command = ["prometheus", f"--config.file={file}", storage, f"--web.listen-address={address}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://{address}/api/v1"
    finally:
        process.terminate()
        process.wait(10)


async def answer(url: str, **parameters: str) -> Any:
    """Return the data of an answer; an error in a query is an HTTPError."""

    def ask() -> Any:
        with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(parameters)}", timeout=5) as got:
            return json.load(got)["data"]

    return await in_thread(ask)


async def has_samples(api: str) -> bool:
    """Whether the set-up time of a stream has a rate by now."""
    try:
        return bool((await answer(f"{api}/query", query="rate(rtunnel_setup_seconds_count[5s]) > 0"))["result"])
    except urllib.error.HTTPError as error:  # it is still starting
        error.close()
    except OSError:
        pass  # it does not listen yet
    return False


async def test_every_query_and_rule_can_be_evaluated(tmp_path: Path, events: Events) -> None:
    """No matching of vectors fails, and no alert is pending for a healthy cluster."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.start_broker("b1", admin="127.0.0.1:0")
        await cluster.start_broker("b2", admin="127.0.0.1:0")
        await cluster.start_gateway(admin="127.0.0.1:0")
        await cluster.start_agent("a1", IP, admin="127.0.0.1:0")
        await cluster.whole()
        targets = [line["address"] for line in events if line["event"] == "admin_endpoint_opened"]
        with prometheus(tmp_path, targets) as api, trio.fail_after(30):
            while not await has_samples(api):
                (await cluster.socks(IP, Target(IP).port)).close()
                with pytest.raises(SocksRefused):
                    await cluster.socks("127.1.0.9", 80)
                await trio.sleep(0.1)
            for path in sorted((ROOT / "deploy/grafana").glob("*.json")):
                for panel in json.loads(path.read_text())["panels"]:
                    for target in panel.get("targets", ()):
                        query = re.sub(r'"\$\w+"', '".*"', re.sub(r"\[\$__\w+\]", "[5s]", target["expr"]))
                        await answer(f"{api}/query", query=query)
            (group,) = (await answer(f"{api}/rules"))["groups"]
            assert not [(r["name"], r.get("lastError")) for r in group["rules"] if r["health"] == "err"]
            assert not [rule["name"] for rule in group["rules"] if rule["state"] != "inactive"]
