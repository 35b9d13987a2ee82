//! The loop on pictures that nobody here made; skipped, saying so, where the data is absent.

use anyhow::Result;
use flywheel_tests::{Flywheel, data_dir};

#[test]
fn the_loop_closes_on_mnist() -> Result<()> {
    let Some(dir) = data_dir("mnist_idx") else {
        return Ok(());
    };
    let flywheel = Flywheel::new(env!("CARGO_BIN_EXE_flywheel-under-test"));
    let report = tempfile::NamedTempFile::new()?;
    flywheel.succeed(&[
        "demo",
        "--source",
        &format!("idx:{}", dir.display()),
        "--rare",
        "8=0.02",
        "--late",
        "9",
        "--rounds",
        "2",
        "--devices",
        "2",
        "--labels",
        "60",
        "--frames",
        "1500",
        "--steps",
        "120",
        "--scale",
        "0.4",
        "--json",
        &report.path().to_string_lossy(),
    ])?;
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report.path())?)?;
    assert_eq!(report["audit"]["balanced"], true, "{report:#}");
    assert_eq!(report["ok"], true, "{report:#}");
    let rounds = report["rounds"].as_array().map_or(0, Vec::len);
    assert_eq!(rounds, 3, "{report:#}");
    let accuracy = |round: usize| report["rounds"][round]["accuracy"].as_f64();
    assert_eq!(report["rounds"][0]["late_recall"], 0.0, "{report:#}");
    assert!(accuracy(2) > accuracy(0), "{report:#}");
    Ok(())
}
