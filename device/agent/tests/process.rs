//! The agent as systemd and Prometheus meet it: a process that says when it is ready, answers on
//! its metrics port, and ends in good order on SIGTERM; and `doctor` before, during and after.

#[allow(dead_code, reason = "each test uses its part")]
mod fake;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use fake::Cloud;
use flywheel_agent::state::State;

const AGENT: &str = env!("CARGO_BIN_EXE_flywheel-agent");
const SOURCE: &str = "sim:roads?seed=5&size=32";

/// A port that was free a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

fn write_config(data: &Path, port: u16) -> std::path::PathBuf {
    let path = data.join("agent.toml");
    let text = format!(
        "data = \".\"\nsource = {SOURCE:?}\npace = 50\ntransport = [\"quic\"]\nhealth_interval_ms = 100\nmetrics = \"127.0.0.1:{port}\"\n[budget]\nratio = 0.5\n[spool]\nquota_mb = 1\n"
    );
    fs::write(&path, text).unwrap();
    path
}

fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// Exit code and report of `doctor --json`.
fn doctor(config: &Path) -> (Option<i32>, serde_json::Value) {
    let output = Command::new(AGENT)
        .args(["doctor", "--json", "--config"])
        .arg(config)
        .output()
        .unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output.status.code(), report)
}

fn verdict<'a>(report: &'a serde_json::Value, name: &str) -> &'a str {
    let checks = report["checks"].as_array().unwrap();
    let check = checks.iter().find(|check| check["name"] == name);
    let check = check.unwrap_or_else(|| panic!("no {name} in {report}"));
    let verdict = check["verdict"].as_str().unwrap();
    // Whoever finds something says what to do about it.
    assert_eq!(check["mend"] == "", verdict == "ok", "{check}");
    verdict
}

#[test]
fn an_agent_tells_systemd_and_prometheus_and_ends_on_sigterm() {
    let data = tempfile::tempdir().unwrap();
    let cloud = Cloud::start(data.path());
    let port = free_port();
    let config = write_config(data.path(), port);

    let (code, report) = doctor(&config);
    for name in [
        "config",
        "data folder",
        "disk space",
        "engine",
        "identity",
        "source",
        "quic",
    ] {
        assert_ne!(verdict(&report, name), "fail", "{report}");
    }
    // The fake cloud's clock stands at 0, and no model was rolled out.
    assert_eq!(verdict(&report, "clock"), "fail");
    assert_eq!(verdict(&report, "model"), "warn");
    assert_eq!((code, &report["ok"]), (Some(3), &false.into()));

    let socket = UnixDatagram::bind(data.path().join("notify")).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(120)))
        .unwrap();
    let hear = || {
        let mut bytes = [0; 64];
        let len = socket.recv(&mut bytes).unwrap();
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    };
    let mut child = Command::new(AGENT)
        .args(["run", "--log", "json", "--config"])
        .arg(&config)
        .env("NOTIFY_SOCKET", data.path().join("notify"))
        .env("WATCHDOG_USEC", "200000")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(hear(), "READY=1");
    assert_eq!(hear(), "WATCHDOG=1");
    cloud.wait("a hundred frames", |memory| {
        memory.health.as_ref().is_some_and(|told| told.frame > 100)
    });

    let answer = get(port, "/metrics");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    let value = |name: &str| -> f64 {
        let line = answer
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {answer}"))
            .parse()
            .unwrap()
    };
    let seen = value("flywheel_frames_seen_total");
    assert!(seen > 50.0);
    let passed = seen + value("flywheel_frames_dropped_total");
    // Counted one after the other, while frames go on.
    assert!(
        (passed - value("flywheel_frame_index")).abs() <= 2.0,
        "{answer}"
    );
    assert!(value("flywheel_uplink_sent_bytes_total") > 0.0);
    assert!(value("process_resident_memory_bytes") > 1e6);
    assert!(value("flywheel_flagged_samples_total{lane=\"uniform\"}") > 0.0);
    assert!(get(port, "/").starts_with("HTTP/1.1 404"));

    let (_, report) = doctor(&config);
    assert_eq!(verdict(&report, "state"), "ok");
    assert_eq!(verdict(&report, "model"), "warn");
    assert_eq!(verdict(&report, "clock"), "warn");

    let killed = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    while hear() != "STOPPING=1" {}
    let mut log = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut log)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{log}");
    for line in log.lines() {
        let entry: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(
            entry["level"].is_string() && entry["message"].is_string(),
            "{line}"
        );
    }
    assert!(log.contains("agent starts") && log.contains("agent ends"));
    // The farewell says how far it came, and so does the disk.
    let told = cloud.with(|memory| memory.health.clone().unwrap());
    let progress = State::open(data.path()).unwrap().progress(SOURCE);
    assert_eq!(progress.frame, told.frame);
    for book in &told.books {
        let spooled: u32 = book.spooled.iter().map(|(low, high)| high - low + 1).sum();
        assert_eq!(book.flagged, book.acked + spooled);
    }
}

#[test]
fn doctor_says_what_is_missing() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().join("agent.toml");
    let (code, _) = doctor(&path);
    assert_eq!(code, Some(1), "no configuration");
    fs::write(&path, "data = \".\"\nsource = \"dir:no-such-folder\"\n").unwrap();
    let (code, report) = doctor(&path);
    assert_eq!(code, Some(3));
    assert_eq!(verdict(&report, "identity"), "fail");
    assert_eq!(verdict(&report, "source"), "fail");
    assert_eq!(verdict(&report, "data folder"), "ok");
    let output = Command::new(AGENT)
        .args(["doctor", "--config"])
        .arg(&path)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("→ enrol it") && text.contains("2 failed"),
        "{text}"
    );
}

#[test]
fn a_watched_folder_needs_a_pace() {
    let data = tempfile::tempdir().unwrap();
    let _cloud = Cloud::start(data.path());
    fs::create_dir(data.path().join("pictures")).unwrap();
    let source = format!("dir:{}?watch=1", data.path().join("pictures").display());
    let path = data.path().join("agent.toml");
    fs::write(&path, format!("data = \".\"\nsource = {source:?}\n")).unwrap();
    let output = Command::new(AGENT)
        .args(["run", "--config"])
        .arg(&path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("pace = 30"), "{text}");
}
