//! `flywheel demo` small: the whole loop closes, survives kills, and repeats itself.

use anyhow::{Context, Result};
use flywheel_tests::Flywheel;
use serde_json::Value;

fn demo(extra: &[&str]) -> Result<(Value, String)> {
    let flywheel = Flywheel::new(env!("CARGO_BIN_EXE_flywheel-under-test"));
    let dir = tempfile::tempdir()?;
    let report = dir.path().join("out.json");
    let report_path = report.to_string_lossy();
    let args = [
        &[
            "demo",
            "--rounds",
            "1",
            "--devices",
            "2",
            "--labels",
            "60",
            "--frames",
            "1500",
            "--steps",
            "150",
            "--scale",
            "0.3",
            "--json",
            &report_path,
        ],
        extra,
    ]
    .concat();
    let printed = flywheel.succeed(&args)?;
    let text = std::fs::read_to_string(&report).context("the demo left no report")?;
    Ok((serde_json::from_str(&text)?, printed))
}

fn assert_closed(report: &Value, printed: &str) {
    let audit = &report["audit"];
    assert_eq!(audit["balanced"], true, "{report:#}");
    assert!(audit["flagged"].as_u64().unwrap() > 20, "{report:#}");
    let dropped: u64 = audit["dropped"]
        .as_object()
        .unwrap()
        .values()
        .map(|count| count.as_u64().unwrap())
        .sum();
    assert_eq!(
        audit["flagged"].as_u64().unwrap(),
        audit["ingested"].as_u64().unwrap() + audit["spooled"].as_u64().unwrap() + dropped,
        "{report:#}"
    );
    assert_eq!(report["rounds"][0]["rollout"], "confirmed", "{report:#}");
    let last = &report["rounds"][1];
    assert!(
        last["rollout"] == "confirmed" || last["gate"] != "passed",
        "{report:#}"
    );
    assert!(last["labels"].as_u64().unwrap() > 0, "{report:#}");
    assert!(
        last["bytes_up"].as_u64().unwrap() > 0
            && last["bytes_up"].as_f64().unwrap() <= 0.05 * last["bytes_seen"].as_f64().unwrap(),
        "{report:#}"
    );
    assert!(printed.contains("balanced"), "{printed}");
}

#[test]
fn the_loop_closes_and_repeats_itself() -> Result<()> {
    let (first, printed) = demo(&[])?;
    assert_closed(&first, &printed);
    let (second, _) = demo(&[])?;
    assert_eq!(first["labels_digest"], second["labels_digest"]);
    for round in 0..2 {
        for field in ["candidate", "model", "labels", "accuracy", "gate"] {
            assert_eq!(
                first["rounds"][round][field], second["rounds"][round][field],
                "{field} of round {round}"
            );
        }
    }
    Ok(())
}

#[test]
fn kills_at_random_moments_lose_nothing() -> Result<()> {
    let (report, printed) = demo(&["--chaos", "6", "--seed", "11"])?;
    assert_closed(&report, &printed);
    let restarts: u64 = report["restarts"]
        .as_object()
        .unwrap()
        .values()
        .map(|count| count.as_u64().unwrap())
        .sum();
    assert!(restarts >= 3, "{report:#}");
    Ok(())
}
