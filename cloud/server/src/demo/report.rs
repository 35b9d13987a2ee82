//! What the demo found out, for people and for programs.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::api::types::{AuditView, ReportView};
use crate::cli::format::{bytes, percent, short, table};

/// One round. Bytes are of the whole fleet since the start.
#[derive(Clone, Debug, Serialize)]
pub struct Round {
    /// Number of the round; 0 is the first model, before any label.
    pub round: u32,
    /// Digest of the champion after the round.
    pub model: String,
    /// Labels used so far.
    pub labels: u32,
    /// Bytes that uploading every frame would have cost.
    pub bytes_seen: u64,
    /// Bytes of all uplink messages that arrived.
    pub bytes_up: u64,
    /// Share of the golden set whose class was right.
    pub accuracy: f64,
    /// Mean recall over classes of the golden set.
    pub balanced_accuracy: f64,
    /// Mean recall of the rare classes.
    pub rare_recall: f64,
    /// Recall of the class that appears late.
    pub late_recall: f64,
    /// Expected calibration error.
    pub ece: f64,
    /// `passed`, or why the candidate of this round was refused.
    pub gate: String,
    /// State of the rollout; `none` when the gate refused.
    pub rollout: String,
    /// Seconds from the last label of the batch until the canary had confirmed the model: dataset,
    /// training, evaluation, signing and trial.
    pub label_to_canary_s: Option<f64>,
    /// Seconds from the last label of the batch until every device had confirmed it.
    pub label_to_all_s: Option<f64>,
    /// Digest of the candidate that the gate judged.
    pub candidate: String,
    /// What devices and queue found of the classes that matter.
    pub found: Found,
}

/// Distinct pictures so far, by the truth of the source.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Found {
    /// Uploaded.
    pub uploaded: u32,
    /// Uploaded, of a rare class.
    pub uploaded_rare: u32,
    /// Uploaded, of the late class.
    pub uploaded_late: u32,
    /// Labelled, of a rare class.
    pub labelled_rare: u32,
    /// Labelled, of the late class.
    pub labelled_late: u32,
}

impl Round {
    /// Fills in what an evaluation says.
    pub fn measure(&mut self, report: &ReportView, late: &str) {
        self.accuracy = report.accuracy;
        self.balanced_accuracy = report.balanced_accuracy;
        self.rare_recall = report.rare_recall.unwrap_or(0.0);
        self.late_recall = report.recall.get(late).copied().unwrap_or(0.0);
        self.ece = report.ece;
    }
}

/// The whole demo.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Source of frames.
    pub source: String,
    /// Seed of everything.
    pub seed: u64,
    /// How samples and items were chosen.
    pub select: String,
    /// Number of devices.
    pub devices: u32,
    /// Engine of the devices.
    pub engine: String,
    /// Share of wrong answers of the simulated labeller.
    pub labeller_error: f64,
    /// Classes held rare.
    pub rare: Vec<String>,
    /// The class that appears late.
    pub late: String,
    /// The rounds.
    pub rounds: Vec<Round>,
    /// Digest over which pictures were labelled with which classes, in order of picture.
    pub labels_digest: String,
    /// The conservation law.
    pub audit: AuditView,
    /// Processes that died and were started again.
    pub restarts: BTreeMap<String, u32>,
    /// Seconds by station.
    pub seconds: BTreeMap<String, f64>,
    /// Whether the audit balances and every rollout confirmed on all devices.
    pub ok: bool,
}

impl Report {
    /// The closing table.
    pub fn table(&self) -> String {
        let mut table = table(&[
            "round",
            "labels",
            "uploaded",
            "of seen",
            "accuracy",
            "rare",
            "late",
            "ece",
            "model",
            "gate",
            "rollout",
            "to canary",
            "to all",
        ]);
        let seconds = |s: Option<f64>| s.map_or("–".to_owned(), |s| format!("{s:.1} s"));
        for round in &self.rounds {
            table.add_row([
                round.round.to_string(),
                round.labels.to_string(),
                bytes(round.bytes_up),
                if round.bytes_seen == 0 {
                    "–".to_owned()
                } else {
                    percent(round.bytes_up as f64 / round.bytes_seen as f64)
                },
                percent(round.accuracy),
                percent(round.rare_recall),
                percent(round.late_recall),
                format!("{:.3}", round.ece),
                short(&round.model).to_owned(),
                if round.gate == "passed" {
                    "passed".to_owned()
                } else {
                    "refused".to_owned()
                },
                round.rollout.clone(),
                seconds(round.label_to_canary_s),
                seconds(round.label_to_all_s),
            ]);
        }
        table.to_string()
    }
}
