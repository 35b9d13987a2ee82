//! What is installed beside the program: the unit for systemd and the dashboard for Grafana.

#[allow(dead_code, reason = "each test uses its part")]
mod virtual_time;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Command;

use flywheel_agent::metrics::expose::{About, text};
use serde_json::Value;
use virtual_time::{Cost, Device, Setup};

const AGENT: &str = env!("CARGO_BIN_EXE_flywheel-agent");
const UNIT: &str = include_str!("../dist/flywheel-agent.service");
const DASHBOARD: &str = include_str!("../dist/grafana-dashboard.json");

/// The last value of each key of a unit, with its section in front.
fn keys() -> BTreeMap<String, &'static str> {
    let mut section = "";
    let mut keys = BTreeMap::new();
    for line in UNIT.lines().filter(|line| !line.is_empty()) {
        if line.starts_with('#') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            section = name.strip_suffix(']').expect("a section ends with ]");
            continue;
        }
        let (key, value) = line.split_once('=').expect("a key and a value");
        keys.insert(format!("{section}.{key}"), value);
    }
    keys
}

#[test]
fn the_unit_is_watched_restarted_and_starts_this_program() {
    let keys = keys();
    for (key, value) in [
        ("Service.Type", "notify"),
        ("Service.Restart", "always"),
        ("Service.NoNewPrivileges", "yes"),
        ("Service.ProtectSystem", "strict"),
        ("Service.StateDirectory", "flywheel"),
        ("Install.WantedBy", "multi-user.target"),
    ] {
        assert_eq!(keys.get(key), Some(&value), "{key}");
    }
    let watchdog: u64 = keys["Service.WatchdogSec"].parse().unwrap();
    assert!(watchdog >= 10, "a frame may take seconds to infer");
    // The program takes its arguments, the last of which is the configuration.
    let mut words = keys["Service.ExecStart"].split(' ');
    assert_eq!(words.next(), Some("/usr/local/bin/flywheel-agent"));
    let output = Command::new(AGENT).args(words).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("/etc/flywheel/agent.toml"), "{told}");
}

#[test]
fn systemd_takes_the_unit_where_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("flywheel-agent.service");
    fs::write(&path, UNIT.replace("/usr/local/bin/flywheel-agent", AGENT)).unwrap();
    match Command::new("systemd-analyze")
        .arg("verify")
        .arg(&path)
        .output()
    {
        Ok(output) => {
            let told = String::from_utf8_lossy(&output.stderr);
            // It also tells what it thinks of the other units of this machine.
            let about_it = told.lines().find(|line| line.contains("flywheel-agent"));
            assert_eq!(about_it, None, "{told}");
        }
        Err(error) => eprintln!("skipped: no systemd-analyze: {error}"),
    }
}

/// Names of metrics in a query.
fn metrics(query: &str) -> impl Iterator<Item = &str> {
    let words = query.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("flywheel_") || word.starts_with("process_"))
}

#[test]
fn the_dashboard_asks_for_what_the_agent_tells() {
    let cost = Cost {
        us: 8_000,
        stall_every: 0,
        stall_us: 0,
        fails_at: None,
        panics_at: None,
    };
    let mut device = Device::new(&Setup {
        frames: 10,
        bad_every: 0,
        waiting: 4,
        quota: 200_000,
        live: cost,
        extra: "",
    });
    while device.turn() {}
    let about = About {
        device: "cam".to_owned(),
        source: "camera".to_owned(),
        engine: "tract".to_owned(),
    };
    let told = text(&device.shared, &about);
    let mut known = BTreeSet::new();
    for line in told.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        let (name, kind) = line.split_once(' ').unwrap();
        known.insert(name.to_owned());
        if kind == "histogram" {
            known.insert(format!("{name}_bucket"));
        }
    }
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut asked = BTreeSet::new();
    for panel in panels {
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{}", panel["title"]);
        for target in targets {
            let query = target["expr"].as_str().unwrap();
            assert!(metrics(query).count() > 0, "{query}");
            for name in metrics(query) {
                assert!(known.contains(name), "{}: no {name}", panel["title"]);
                asked.insert(name);
            }
        }
    }
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    for query in variables.iter().filter_map(|v| v["query"].as_str()) {
        assert!(metrics(query).all(|name| known.contains(name)), "{query}");
    }
    assert!(asked.len() >= 12, "{asked:?}");
}
