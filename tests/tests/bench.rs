//! Benchmarks of the server run and say what they measured; how fast is for people to judge.

use anyhow::Result;
use flywheel_tests::Flywheel;

#[test]
fn ingest_is_measured_on_both_transports() -> Result<()> {
    let flywheel = Flywheel::new(env!("CARGO_BIN_EXE_flywheel-under-test"));
    let report = flywheel.json(&[
        "bench",
        "ingest",
        "--kib",
        "3",
        "--seconds",
        "1",
        "--devices",
        "2",
    ])?;
    for (line, transport) in [
        (&report["results"][0], "quic"),
        (&report["results"][1], "mqtt"),
    ] {
        assert_eq!(line["transport"], transport, "{report:#}");
        assert!(line["samples"].as_u64() > Some(0), "{report:#}");
        assert!(line["ack_ms"]["p50"].as_f64() <= line["ack_ms"]["p99"].as_f64());
    }
    Ok(())
}
