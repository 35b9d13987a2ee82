//! A benchmark that another program drives, line by line, so that runs of two runtimes can take
//! turns on one machine.
//!
//! On stdin: `run FIRST COUNT` takes frames of the source, `memory` asks for resident memory, the
//! end of the input ends the session. Every answer is one line of JSON on stdout, the first one,
//! `ready`, after the model is loaded.

use std::io::{BufRead, Write};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::report::{ModelReport, memory};
use super::rig::Rig;
use crate::meter::Stage;

#[derive(Serialize)]
#[serde(untagged)]
enum Answer<'a> {
    Ready {
        ready: bool,
        engine: &'static str,
        model: &'a ModelReport,
        load_ms: f64,
        frames: Option<u64>,
    },
    /// Nanoseconds, frame by frame.
    Ran {
        /// Class with the largest logit; -1 where the frame has no answer.
        top1: Vec<i32>,
        read: Vec<u64>,
        preprocess: Vec<u64>,
        infer: Vec<u64>,
        score: Vec<u64>,
        trigger: Vec<u64>,
        spool: Vec<u64>,
        total: Vec<u64>,
    },
    Memory {
        rss_kib: u64,
        peak_rss_kib: u64,
    },
}

/// Runs a session until the input ends.
///
/// # Errors
/// A line that is no command, or a failing source.
pub fn run(
    mut rig: Rig,
    engine: &'static str,
    model: &ModelReport,
    load_ms: f64,
    commands: impl BufRead,
    mut answers: impl Write,
) -> Result<()> {
    let mut say = |answer: &Answer<'_>| -> Result<()> {
        serde_json::to_writer(&mut answers, answer)?;
        answers.write_all(b"\n")?;
        Ok(answers.flush()?)
    };
    say(&Answer::Ready {
        ready: true,
        engine,
        model,
        load_ms,
        frames: rig.frames,
    })?;
    for line in commands.lines() {
        let line = line.context("stdin")?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["run", first, count] => {
                let number = |word: &str| {
                    word.parse::<u64>()
                        .with_context(|| format!("{line:?}: {word:?} is not a whole number"))
                };
                say(&take(&mut rig, number(first)?, number(count)?)?)?;
            }
            ["memory"] => {
                let (rss_kib, peak_rss_kib) = memory();
                say(&Answer::Memory {
                    rss_kib,
                    peak_rss_kib,
                })?;
            }
            _ => bail!("{line:?} is no command; use `run FIRST COUNT` or `memory`"),
        }
    }
    Ok(())
}

fn take(rig: &mut Rig, first: u64, count: u64) -> Result<Answer<'static>> {
    let mut top1 = Vec::new();
    let mut laps = Stage::ALL.map(|_| Vec::new());
    let mut total = Vec::new();
    rig.pipeline.seek(first);
    for _ in 0..count {
        let start = Instant::now();
        rig.pipeline.take()?;
        let nanos = start.elapsed().as_nanos() as u64;
        if rig.pipeline.ended() {
            break;
        }
        total.push(nanos);
        top1.push(rig.pipeline.scores().map_or(-1, |s| i32::from(s.top1)));
        for (laps, stage) in laps.iter_mut().zip(Stage::ALL) {
            laps.push(rig.pipeline.meter().lap(stage).map_or(0, |lap| lap.nanos));
        }
    }
    // No second model runs here.
    let [read, preprocess, infer, score, _, trigger, spool] = laps;
    Ok(Answer::Ran {
        top1,
        read,
        preprocess,
        infer,
        score,
        trigger,
        spool,
        total,
    })
}
