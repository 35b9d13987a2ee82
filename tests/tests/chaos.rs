//! The short form of the chaos program: kills on a bad network, on every route, lose nothing.

use anyhow::{Context, Result};
use flywheel_tests::Flywheel;
use serde_json::Value;

#[test]
fn kills_on_a_bad_network_lose_and_double_nothing() -> Result<()> {
    let chaos = Flywheel::new(env!("CARGO_BIN_EXE_chaos"));
    let printed = chaos.succeed(&["--kills", "12", "--devices", "2", "--seed", "3", "--json"])?;
    let reports: Vec<Value> = serde_json::from_str(&printed)?;
    // mosquitto may be missing, the others never are.
    assert!(reports.len() >= 2, "{printed}");
    for report in reports {
        let count = |field: &str| -> Result<u64> {
            report[field]
                .as_u64()
                .with_context(|| format!("{field} of {report:#}"))
        };
        assert_eq!(report["balanced"], true, "{report:#}");
        assert_eq!(
            count("spooled")? + count("doubled")? + count("damaged")?,
            0,
            "{report:#}"
        );
        assert_eq!(count("stored")?, count("ingested")?, "{report:#}");
        assert!(count("flagged")? > 20, "{report:#}");
        let kills: u64 = report["kills"]
            .as_object()
            .context("kills")?
            .values()
            .filter_map(Value::as_u64)
            .sum();
        assert_eq!(kills, 12, "{report:#}");
    }
    Ok(())
}
