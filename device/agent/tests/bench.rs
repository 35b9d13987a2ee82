//! `flywheel-agent bench` as a program, and the choice of an engine.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use device_engine::{EngineKind, onnx_runtime};
use flywheel_agent::bench::open_model;
use flywheel_agent::models::{EngineChoice, Package, RunnerError, fastest};
use flywheel_shared::trust::PartKind;
use serde_json::Value;

fn agent() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flywheel-agent"));
    command.arg("bench");
    command
}

/// Whether the environment names ONNX Runtime's library, as the program finds it too.
fn ort_is_here() -> bool {
    std::env::var_os(onnx_runtime::VARIABLE).is_some()
}

#[test]
fn every_engine_is_measured_stage_by_stage() {
    let output = agent()
        .args(["--frames", "300", "--json", "--profile"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let engines = report["engines"].as_array().unwrap();
    let names: Vec<&str> = engines
        .iter()
        .filter_map(|e| e["engine"].as_str())
        .collect();
    let all: Vec<&str> = EngineKind::ALL.iter().map(|kind| kind.name()).collect();
    assert_eq!(names, all);
    assert!(names.contains(&report["fastest"].as_str().unwrap()));
    for engine in engines {
        if engine["engine"] == "ort" && !ort_is_here() {
            let error = engine["error"].as_str().unwrap();
            assert!(error.contains("--ort-library"), "{error}");
            continue;
        }
        assert_eq!(engine["golden"], true, "{engine}");
        assert_eq!(engine["frames"], 300);
        assert_eq!(engine["dropped"], 0);
        let stages = engine["stages"].as_array().unwrap();
        let stage = |name: &str| stages.iter().find(|s| s["stage"] == name).unwrap();
        for name in ["read", "preprocess", "infer", "score", "trigger"] {
            let [p50, p95, p99] =
                ["p50_us", "p95_us", "p99_us"].map(|key| stage(name)[key].as_f64().unwrap());
            assert!(0.0 < p50 && p50 <= p95 && p95 <= p99, "{engine}");
            assert_eq!(stage(name)["count"], 300);
        }
        assert_eq!(stage("spool")["count"], engine["flagged"]);
        assert_eq!(
            engine["allocations"]["outside_unflagged_max"], 0,
            "{engine}"
        );
        assert!(engine["rss_kib"].as_u64().unwrap() > 1000);
    }
    // tract tells what its operators cost, the dearest first.
    let costs: Vec<f64> = engines[0]["operators"]
        .as_array()
        .unwrap()
        .iter()
        .map(|operator| operator["us"].as_f64().unwrap())
        .collect();
    assert!(
        costs.len() > 5 && costs.is_sorted_by(|a, b| a >= b),
        "{costs:?}"
    );
}

#[test]
fn a_paced_run_gives_up_the_frames_it_is_too_slow_for() {
    // No engine here runs a million frames a second.
    let output = agent()
        .args([
            "--engine", "tract", "--frames", "20", "--fps", "1000000", "--json",
        ])
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        report["engines"][0]["dropped"].as_u64().unwrap() > 0,
        "{report}"
    );
}

#[test]
fn another_program_can_drive_it_line_by_line() {
    let mut child = agent()
        .args([
            "--engine",
            "auto",
            "--stdin",
            "--source",
            "sim:roads?seed=3",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut commands = child.stdin.take().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut answer = move || -> Value {
        serde_json::from_str(&lines.next().expect("an answer").unwrap()).unwrap()
    };
    let ready = answer();
    assert_eq!(ready["ready"], true);
    assert_eq!(ready["model"]["classes"], 18);
    let mut ask = |line: &str| {
        writeln!(commands, "{line}").unwrap();
        answer()
    };
    let first = ask("run 40 5");
    assert_eq!(first["infer"].as_array().unwrap().len(), 5);
    assert!(
        first["top1"]
            .as_array()
            .unwrap()
            .iter()
            .all(|c| c.as_i64() >= Some(0))
    );
    ask("run 7 1");
    // Frames are random access, and the same frame gets the same answer.
    assert_eq!(ask("run 40 5")["top1"], first["top1"]);
    assert!(ask("memory")["rss_kib"].as_u64().unwrap() > 1000);
    drop(commands);
    assert!(child.wait().unwrap().success());
}

#[test]
fn wrong_flags_are_refused_in_words() {
    for (arguments, expected) in [
        (&["--model", "no/such.onnx"][..], "no/such.onnx"),
        (&["--engine", "tensorrt"], "burn-flex"),
        (&["--stdin"], "--engine tract"),
        (&["--fps", "0"], "--fps"),
        (&["--source", "tape:1", "--engine", "tract"], "tape:1"),
    ] {
        let output = agent().args(arguments).output().unwrap();
        assert!(!output.status.success());
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(told.contains(expected), "{arguments:?}: {told}");
    }
}

/// The parts of the built-in network without some of them.
fn package_without(kinds: &[PartKind], folder: &Path) -> Package {
    open_model(None).unwrap().write_parts(folder).unwrap();
    let mut parts: BTreeMap<PartKind, Vec<u8>> = Package::parts_in(folder).unwrap();
    for kind in kinds {
        assert!(parts.remove(kind).is_some());
    }
    Package::unsigned(parts)
}

#[test]
fn auto_takes_the_fastest_engine_that_can_load_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let whole = package_without(&[], folder.path());
    let (runner, trials) = fastest(&whole);
    let chosen = runner.unwrap().engine();
    let times: Vec<_> = trials
        .iter()
        .filter(|trial| trial.engine != EngineKind::Ort || ort_is_here())
        .map(|trial| (*trial.result.as_ref().unwrap(), trial.engine))
        .collect();
    assert!(times.len() >= 3);
    assert_eq!(
        times.iter().min_by_key(|(nanos, _)| *nanos).unwrap().1,
        chosen
    );

    let onnx_only = package_without(&[PartKind::BurnRecord], folder.path());
    let runner = EngineChoice::Auto.load(&onnx_only).unwrap();
    assert!(["tract", "ort"].contains(&runner.engine().name()));
    let record_only = package_without(&[PartKind::Onnx], folder.path());
    let runner = EngineChoice::Auto.load(&record_only).unwrap();
    assert!(runner.engine().name().starts_with("burn-"));

    let neither = package_without(&[PartKind::Onnx, PartKind::BurnRecord], folder.path());
    let error = EngineChoice::Auto.load(&neither).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("has no"), "{error}");
}

#[test]
fn auto_takes_no_engine_that_answers_otherwise_than_signed() {
    let folder = tempfile::tempdir().unwrap();
    open_model(None)
        .unwrap()
        .write_parts(folder.path())
        .unwrap();
    let path = folder.path().join("golden.bin");
    let mut golden = fs::read(&path).unwrap();
    // In front of the tolerance, the last four bytes, stands the last logit; this is its exponent.
    let at = golden.len() - 5;
    golden[at] ^= 0x40;
    fs::write(&path, golden).unwrap();
    let package = Package::unsigned(Package::parts_in(folder.path()).unwrap());
    let (runner, trials) = fastest(&package);
    assert!(runner.is_none() && trials.iter().all(|trial| trial.result.is_err()));
    let error = EngineChoice::Auto.load(&package).map(|_| ()).unwrap_err();
    assert!(matches!(error, RunnerError::Golden { .. }), "{error}");
}

#[test]
fn engine_names_are_parsed_and_others_refused() {
    for name in ["auto", "tract", "burn-flex", "burn-ndarray"] {
        assert_eq!(name.parse::<EngineChoice>().unwrap().name(), name);
    }
    let error = "fast".parse::<EngineChoice>().unwrap_err().to_string();
    assert!(
        error.contains("\"fast\"") && error.contains("auto"),
        "{error}"
    );
}
