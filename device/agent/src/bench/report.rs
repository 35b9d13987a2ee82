//! What a benchmark says: the numbers, as JSON and as a table.

use std::fmt;
use std::fs;

use serde::Serialize;

use crate::metrics::expose::status_kib;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Version of the agent.
    pub agent: &'static str,
    /// Architecture of the processor.
    pub arch: &'static str,
    /// Processors that this process may use.
    pub cpus: usize,
    /// What was run.
    pub model: ModelReport,
    /// The source of frames.
    pub source: String,
    /// Frames that were run before anything was counted.
    pub warmup: u64,
    /// Each engine.
    pub engines: Vec<EngineReport>,
    /// The engine with the smallest median inference time among those that pass the golden inputs.
    pub fastest: Option<&'static str>,
}

/// The model.
#[derive(Debug, Serialize)]
pub struct ModelReport {
    /// As it was named.
    pub name: String,
    /// Digest of its ONNX file, or of its record if it has none.
    pub digest: String,
    /// Channels, rows, columns.
    pub input: [usize; 3],
    /// Mean that is subtracted, by channel.
    pub mean: [f32; 3],
    /// Deviation that is divided by.
    pub std: [f32; 3],
    /// What pixels are divided by first.
    pub divisor: f32,
    /// Number of classes, K.
    pub classes: usize,
    /// Values of the embedding, d.
    pub embedding: usize,
    /// Bytes of the ONNX form.
    pub onnx_bytes: usize,
}

/// One engine.
#[derive(Debug, Serialize)]
pub struct EngineReport {
    /// Its name.
    pub engine: &'static str,
    /// Why it does not run the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What was measured, if it does.
    #[serde(flatten)]
    pub measured: Option<Measured>,
}

/// The figures of one engine.
#[derive(Debug, Default, Serialize)]
pub struct Measured {
    /// Milliseconds from bytes in memory to a model that has answered the golden inputs.
    pub load_ms: f64,
    /// Whether it passes the golden inputs.
    pub golden: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub golden_error: Option<String>,
    /// Each stage that any frame came to.
    pub stages: Vec<StageReport>,
    /// From pixels to decision: everything but the reading of the picture.
    pub frame: Percentiles,
    /// Everything, from the source on.
    pub total: Percentiles,
    /// Median of score plus median of trigger, by median of infer.
    pub score_trigger_share: f64,
    /// Heap allocations; absent where the program does not count them.
    pub allocations: Option<Allocations>,
    /// Resident memory at the end, in KiB; engines measured before are in it.
    pub rss_kib: u64,
    /// The largest it was.
    pub peak_rss_kib: u64,
    /// Frames that were measured.
    pub frames: u64,
    /// Frames that were flagged.
    pub flagged: u64,
    /// Frames that were given up because processing was too slow; 0 without `--fps`.
    pub dropped: u64,
    /// Frames that could not be read.
    pub skipped: u64,
    /// Frames a second that the measured ones came to.
    pub fps: f64,
    /// The operators, dearest first, if they were asked for and the engine tells.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub operators: Vec<OperatorReport>,
}

/// One stage.
#[derive(Debug, Serialize)]
pub struct StageReport {
    /// Its name.
    pub stage: &'static str,
    /// Frames that came to it.
    pub count: usize,
    /// Its time.
    #[serde(flatten)]
    pub time: Percentiles,
    /// Mean allocations of a frame that came to it, on the frame loop's thread, if counted.
    pub allocations: Option<f64>,
    /// Most allocations of a frame, if counted.
    pub max_allocations: Option<u64>,
}

/// Microseconds, by nearest rank.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Percentiles {
    /// Median.
    pub p50_us: f64,
    /// Of 100 frames, 5 take longer.
    pub p95_us: f64,
    /// Of 100 frames, 1 takes longer.
    pub p99_us: f64,
}

impl Percentiles {
    /// Of these nanoseconds, which are put in order.
    pub fn of(nanos: &mut [u64]) -> Self {
        nanos.sort_unstable();
        let rank = |percent: usize| {
            let index = (nanos.len() * percent).div_ceil(100).max(1) - 1;
            nanos.get(index).map_or(0.0, |&n| n as f64 / 1000.0)
        };
        Self {
            p50_us: rank(50),
            p95_us: rank(95),
            p99_us: rank(99),
        }
    }
}

/// Heap allocations per frame in steady state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Allocations {
    /// Of frames that were not flagged, outside engine and source: mean.
    pub outside_unflagged: f64,
    /// The most of any such frame.
    pub outside_unflagged_max: u64,
    /// Of all frames, in score and trigger: the most of any frame.
    pub score_trigger_max: u64,
    /// Of frames that were flagged, outside engine and source: mean.
    pub outside_flagged: f64,
    /// In the engine, on the frame loop's thread: mean.
    pub engine: f64,
    /// On all other threads: mean.
    pub other_threads: f64,
    /// In the source: mean.
    pub source: f64,
}

/// What an operator costs.
#[derive(Debug, Serialize)]
pub struct OperatorReport {
    /// The node's name in the engine's graph.
    pub node: String,
    /// Its operator.
    pub operator: String,
    /// Shape of its output.
    pub shape: Vec<usize>,
    /// Microseconds of a run.
    pub us: f64,
    /// Share of all operators' time.
    pub share: f64,
}

/// Resident memory now and at most, in KiB; zeros where there is no `/proc`.
pub fn memory() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name| status_kib(&status, name).unwrap_or(0);
    (field("VmRSS:"), field("VmHWM:"))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [channels, height, width] = self.model.input;
        writeln!(
            f,
            "{}: {width}×{height}×{channels}, {} classes, embedding {}; {} on {} ({} CPUs)",
            self.model.name,
            self.model.classes,
            self.model.embedding,
            self.source,
            self.arch,
            self.cpus
        )?;
        for report in &self.engines {
            writeln!(f, "\n{}", report.engine)?;
            match (&report.measured, &report.error) {
                (Some(measured), _) => write!(f, "{measured}")?,
                (None, error) => writeln!(f, "  {}", error.as_deref().unwrap_or("not run"))?,
            }
        }
        if let Some(fastest) = self.fastest {
            writeln!(f, "\nfastest that passes the golden inputs: {fastest}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  {:<12}{:>10}{:>10}{:>10}{:>8}{:>14}",
            "stage", "p50 µs", "p95 µs", "p99 µs", "frames", "allocations"
        )?;
        for stage in &self.stages {
            row(f, stage.stage, &stage.time)?;
            match stage.allocations {
                Some(mean) => writeln!(f, "{:>8}{mean:>14.2}", stage.count)?,
                None => writeln!(f, "{:>8}{:>14}", stage.count, "-")?,
            }
        }
        for (name, time) in [("frame", &self.frame), ("total", &self.total)] {
            row(f, name, time)?;
            writeln!(f, "{:>8}", self.frames)?;
        }
        let share = 100.0 * self.score_trigger_share;
        write!(f, "  score + trigger {share:.2} % of infer; ")?;
        match &self.allocations {
            Some(counted) => writeln!(
                f,
                "allocations per unflagged frame outside the engine {:.2} (at most {}), in it {:.1}",
                counted.outside_unflagged,
                counted.outside_unflagged_max,
                counted.engine + counted.other_threads,
            )?,
            None => writeln!(f, "allocations are counted by flywheel-agent only")?,
        }
        writeln!(
            f,
            "  load {:.1} ms, golden inputs {}, RSS {} KiB (peak {}), flagged {}, dropped {}, skipped {}, {:.0} frames/s",
            self.load_ms,
            self.golden_error.as_deref().unwrap_or("passed"),
            self.rss_kib,
            self.peak_rss_kib,
            self.flagged,
            self.dropped,
            self.skipped,
            self.fps
        )?;
        for operator in &self.operators {
            writeln!(
                f,
                "  {:>10.1} µs {:>5.1} %  {:<24} {:?} {}",
                operator.us,
                100.0 * operator.share,
                operator.operator,
                operator.shape,
                operator.node
            )?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, time: &Percentiles) -> fmt::Result {
    write!(
        f,
        "  {name:<12}{:>10.2}{:>10.2}{:>10.2}",
        time.p50_us, time.p95_us, time.p99_us
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let mut nanos: Vec<u64> = (1..=100).rev().map(|n| n * 1000).collect();
        let found = Percentiles::of(&mut nanos);
        assert_eq!(
            (found.p50_us, found.p95_us, found.p99_us),
            (50.0, 95.0, 99.0)
        );
        let one = Percentiles::of(&mut [3000]);
        assert_eq!((one.p50_us, one.p99_us), (3.0, 3.0));
        assert_eq!(Percentiles::of(&mut []).p50_us, 0.0);
    }
}
