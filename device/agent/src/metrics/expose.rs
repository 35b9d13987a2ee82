//! The metrics as text (Prometheus exposition format 0.0.4). Names and units follow the
//! conventions of Prometheus: base units, `_total` for counters, labels rather than names.

use std::fmt::Write;
use std::fs;
use std::sync::atomic::Ordering;

use flywheel_shared::message::{Lane, LossReason};

use super::{BOUNDS_US, Metrics};
use crate::clock::cpu_us;
use crate::meter::Stage;
use crate::shared::{Shared, lock};

/// What stands in the labels of `flywheel_agent_info`.
#[derive(Clone, Debug)]
pub struct About {
    /// The device's name.
    pub device: String,
    /// The source's URI.
    pub source: String,
    /// The engine that the configuration names, or `auto`.
    pub engine: String,
}

/// A temperature sensor of the board.
#[derive(Clone, Debug, PartialEq)]
struct Temperature {
    zone: String,
    kind: String,
    celsius: f64,
}

/// All metrics of an agent at this moment.
pub fn text(shared: &Shared, about: &About) -> String {
    let mut out = String::with_capacity(8 << 10);
    let usage = lock(&shared.spool).usage();
    let status = shared.status();
    head(
        &mut out,
        "flywheel_agent_info",
        "gauge",
        "The agent that answers; always 1.",
    );
    sample(
        &mut out,
        "flywheel_agent_info",
        &[
            ("device", &about.device),
            ("source", &about.source),
            ("engine", &about.engine),
            ("version", env!("CARGO_PKG_VERSION")),
        ],
        1.0,
    );
    counters(&mut out, &shared.metrics);
    head(
        &mut out,
        "flywheel_frame_index",
        "gauge",
        "Index of the next frame of the source.",
    );
    sample(
        &mut out,
        "flywheel_frame_index",
        &[],
        status.progress.frame as f64,
    );
    head(
        &mut out,
        "flywheel_frame_loop_held",
        "gauge",
        "1 while no frame may be taken.",
    );
    sample(
        &mut out,
        "flywheel_frame_loop_held",
        &[],
        f64::from(u8::from(status.held)),
    );
    head(
        &mut out,
        "flywheel_spool_bytes",
        "gauge",
        "Bytes of samples and loss records on disk that are not acknowledged.",
    );
    sample(&mut out, "flywheel_spool_bytes", &[], usage.bytes as f64);
    head(
        &mut out,
        "flywheel_spool_records",
        "gauge",
        "Samples and loss records that are not acknowledged.",
    );
    sample(
        &mut out,
        "flywheel_spool_records",
        &[],
        usage.records as f64,
    );
    head(
        &mut out,
        "flywheel_uplink_sent_bytes_total",
        "counter",
        "Bytes of all messages sent, since the device was enrolled.",
    );
    sample(
        &mut out,
        "flywheel_uplink_sent_bytes_total",
        &[],
        shared.bytes_up() as f64,
    );
    head(
        &mut out,
        "flywheel_model_info",
        "gauge",
        "The live model; 1, or absent without one.",
    );
    if let Some(live) = status.live {
        let (digest, sequence) = (live.digest.to_string(), live.sequence.to_string());
        let labels = [
            ("digest", digest.as_str()),
            ("sequence", &sequence),
            ("engine", status.engine.map_or("", |engine| engine.name())),
        ];
        sample(&mut out, "flywheel_model_info", &labels, 1.0);
    }
    stages(&mut out, &shared.metrics);
    machine(&mut out);
    out
}

fn counters(out: &mut String, metrics: &Metrics) {
    for (name, help, counter) in [
        (
            "flywheel_frames_seen_total",
            "Frames looked at.",
            &metrics.seen,
        ),
        (
            "flywheel_frames_dropped_total",
            "Frames given up because inference was behind; they were never flagged.",
            &metrics.dropped,
        ),
        (
            "flywheel_frames_skipped_total",
            "Frames that could not be read.",
            &metrics.skipped,
        ),
        (
            "flywheel_inference_failures_total",
            "Frames that the live model gave no answer on.",
            &metrics.failed,
        ),
        (
            "flywheel_model_swaps_total",
            "Models that took over from another.",
            &metrics.swaps,
        ),
    ] {
        head(out, name, "counter", help);
        sample(out, name, &[], counter.get() as f64);
    }
    let name = "flywheel_flagged_samples_total";
    head(out, name, "counter", "Samples that took a number, by lane.");
    for (lane, counter) in Lane::ALL.iter().zip(&metrics.flagged) {
        sample(out, name, &[("lane", lane.name())], counter.get() as f64);
    }
    let name = "flywheel_lost_samples_total";
    head(
        out,
        name,
        "counter",
        "Samples lost when they were flagged, by reason.",
    );
    for (reason, counter) in LossReason::ALL.iter().zip(&metrics.lost) {
        sample(
            out,
            name,
            &[("reason", reason.name())],
            counter.get() as f64,
        );
    }
}

fn stages(out: &mut String, metrics: &Metrics) {
    let name = "flywheel_stage_duration_seconds";
    head(
        out,
        name,
        "histogram",
        "Time that a stage of the frame loop took, by frame.",
    );
    let bucket = format!("{name}_bucket");
    for (stage, histogram) in Stage::ALL.iter().zip(&metrics.stages) {
        let label = ("stage", stage.name());
        let mut count = 0;
        for (at, found) in histogram.buckets.iter().enumerate() {
            count += found.load(Ordering::Relaxed);
            let bound = match BOUNDS_US.get(at) {
                Some(us) => (*us as f64 / 1e6).to_string(),
                None => "+Inf".to_owned(),
            };
            sample(out, &bucket, &[label, ("le", &bound)], count as f64);
        }
        let sum = histogram.sum_ns.load(Ordering::Relaxed) as f64 / 1e9;
        sample(out, &format!("{name}_sum"), &[label], sum);
        // Of the buckets just written, so that the two never disagree.
        sample(out, &format!("{name}_count"), &[label], count as f64);
    }
}

fn machine(out: &mut String) {
    if let Some(bytes) = resident_bytes() {
        head(
            out,
            "process_resident_memory_bytes",
            "gauge",
            "Resident memory of the agent.",
        );
        sample(out, "process_resident_memory_bytes", &[], bytes as f64);
    }
    head(
        out,
        "process_cpu_seconds_total",
        "counter",
        "Processor time of the agent.",
    );
    sample(out, "process_cpu_seconds_total", &[], cpu_us() as f64 / 1e6);
    let name = "flywheel_temperature_celsius";
    head(
        out,
        name,
        "gauge",
        "Temperature by thermal zone of the board; absent where it tells none.",
    );
    for sensor in temperatures() {
        let labels = [("zone", sensor.zone.as_str()), ("type", &sensor.kind)];
        sample(out, name, &labels, sensor.celsius);
    }
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn sample(out: &mut String, name: &str, labels: &[(&str, &str)], value: f64) {
    out.push_str(name);
    for (at, (label, text)) in labels.iter().enumerate() {
        out.push(if at == 0 { '{' } else { ',' });
        let _ = write!(out, "{label}=\"");
        for c in text.chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                c => out.push(c),
            }
        }
        out.push('"');
    }
    if !labels.is_empty() {
        out.push('}');
    }
    let _ = writeln!(out, " {value}");
}

/// Resident memory of this process; `None` where `/proc` is missing.
pub fn resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some(1024 * status_kib(&status, "VmRSS:")?)
}

/// A size in the text of `/proc/self/status`, in KiB; `name` ends with its colon.
pub(crate) fn status_kib(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// What the kernel's thermal zones say; empty on a machine without.
fn temperatures() -> Vec<Temperature> {
    let Ok(entries) = fs::read_dir("/sys/class/thermal") else {
        return Vec::new();
    };
    let mut found: Vec<Temperature> = entries
        .flatten()
        .filter_map(|entry| {
            let zone = entry.file_name().into_string().ok()?;
            if !zone.starts_with("thermal_zone") {
                return None;
            }
            let milli = fs::read_to_string(entry.path().join("temp")).ok()?;
            let kind = fs::read_to_string(entry.path().join("type")).unwrap_or_default();
            Some(Temperature {
                zone,
                kind: kind.trim().to_owned(),
                celsius: milli.trim().parse::<f64>().ok()? / 1000.0,
            })
        })
        .collect();
    found.sort_by(|a, b| a.zone.cmp(&b.zone));
    found
}

#[cfg(test)]
mod tests {
    use flywheel_shared::message::LossReason;

    use super::*;

    fn value(text: &str, name: &str) -> f64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in:\n{text}"))
            .parse()
            .unwrap()
    }

    #[test]
    fn histograms_are_cumulative_and_agree_with_their_count() {
        let metrics = Metrics::default();
        for us in [3, 10, 11, 800, 5_000_000] {
            metrics.stages[Stage::Infer as usize].observe(1000 * us);
        }
        let mut text = String::new();
        stages(&mut text, &metrics);
        let bucket = |bound| {
            let name =
                format!("flywheel_stage_duration_seconds_bucket{{stage=\"infer\",le=\"{bound}\"}}");
            value(&text, &name)
        };
        assert_eq!(bucket("0.00001"), 2.0);
        assert_eq!(bucket("0.000025"), 3.0);
        assert_eq!(bucket("0.001"), 4.0);
        assert_eq!(bucket("1"), 4.0);
        assert_eq!(bucket("+Inf"), 5.0);
        assert_eq!(
            value(
                &text,
                "flywheel_stage_duration_seconds_count{stage=\"infer\"}"
            ),
            5.0
        );
        assert_eq!(
            value(
                &text,
                "flywheel_stage_duration_seconds_count{stage=\"spool\"}"
            ),
            0.0
        );
        let sum = value(
            &text,
            "flywheel_stage_duration_seconds_sum{stage=\"infer\"}",
        );
        assert!((sum - 5.000_824).abs() < 1e-9);
    }

    #[test]
    fn counters_name_their_lane_and_reason() {
        let metrics = Metrics::default();
        metrics.seen.add(7);
        metrics.flagged(Lane::Novel, None);
        metrics.flagged(Lane::Uniform, Some(LossReason::Oversize));
        let mut text = String::new();
        counters(&mut text, &metrics);
        assert_eq!(value(&text, "flywheel_frames_seen_total"), 7.0);
        assert_eq!(
            value(&text, "flywheel_flagged_samples_total{lane=\"novel\"}"),
            1.0
        );
        assert_eq!(
            value(&text, "flywheel_flagged_samples_total{lane=\"uniform\"}"),
            1.0
        );
        assert_eq!(
            value(&text, "flywheel_lost_samples_total{reason=\"oversize\"}"),
            1.0
        );
        assert_eq!(
            value(&text, "flywheel_lost_samples_total{reason=\"evicted\"}"),
            0.0
        );
        for line in text.lines().filter(|line| line.starts_with("# TYPE")) {
            assert!(line.ends_with("_total counter"), "{line}");
        }
    }

    #[test]
    fn labels_are_escaped() {
        let mut text = String::new();
        sample(&mut text, "a", &[("source", "dir:a\"b\\c\nd")], 1.0);
        assert_eq!(text, "a{source=\"dir:a\\\"b\\\\c\\nd\"} 1\n");
    }

    #[test]
    fn memory_is_read_in_kib() {
        let status = "Name:\tx\nVmRSS:\t   12 kB\n";
        assert_eq!(status_kib(status, "VmRSS:"), Some(12));
        assert_eq!(status_kib(status, "VmHWM:"), None);
        assert!(resident_bytes().is_some_and(|bytes| bytes > 100_000));
    }
}
