//! The conservation law, checked by set arithmetic: every sample that a device flagged was
//! ingested, is still spooled, or has a recorded drop; none is missing and none counts twice.
//!
//! The server keeps one [`Ledger`] per (device, boot epoch). A device's own report is older than
//! what the cloud knows by the time it is read, so a number may be both ingested (or lost) and
//! reported as spooled; the cloud's knowledge wins. Ingest must likewise ignore a loss record for a
//! number it holds, and a sample whose loss is booked: the two together are a double booking here.

use crate::ranges::RangeSet;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// All that is known about the samples of one boot epoch of one device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// The device's id.
    pub device: String,
    /// The device's boot epoch.
    pub epoch: u32,
    /// The last number given out: the device flagged exactly the numbers `1..=flagged`.
    pub flagged: u32,
    /// How many samples the device holds for acknowledged by the cloud.
    pub acked: u32,
    /// Numbers that the device reported as still in its spool.
    pub spooled: RangeSet,
    /// Numbers that the cloud has committed.
    pub ingested: RangeSet,
    /// Numbers with a loss record, by reason.
    pub lost: BTreeMap<String, RangeSet>,
}

impl Ledger {
    /// Books the loss of `sequence`, unless it is ingested or lost already; true when booked.
    pub fn lose(&mut self, sequence: u32, reason: &str) -> bool {
        let known = self.ingested.contains(sequence)
            || self.lost.values().any(|set| set.contains(sequence));
        if known {
            return false;
        }
        match self.lost.get_mut(reason) {
            Some(set) => set.insert(sequence),
            None => {
                self.lost
                    .insert(reason.to_owned(), RangeSet::from_range(sequence..=sequence));
                true
            }
        }
    }
}

/// Numbers of one epoch that break the law.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The device's id.
    pub device: String,
    /// Its boot epoch.
    pub epoch: u32,
    /// The numbers.
    pub ranges: RangeSet,
}

/// The audit of a fleet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Samples flagged.
    pub flagged: u64,
    /// Samples ingested.
    pub ingested: u64,
    /// Samples spooled and neither ingested nor lost.
    pub spooled: u64,
    /// Samples lost, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// Flagged numbers with no record at all.
    pub missing: Vec<Finding>,
    /// Numbers both ingested and lost, or lost for two reasons.
    pub double: Vec<Finding>,
    /// Numbers that some record names but the device never gave out (0 or above its last).
    pub unflagged: Vec<Finding>,
    /// `(device, epoch, acked, known)`: the device holds more samples for acknowledged than the
    /// cloud has ingested or booked as lost.
    pub over_acked: Vec<(String, u32, u32, u64)>,
    /// Whether the law holds: the four lists above are empty.
    pub balanced: bool,
}

/// Checks the conservation law over `ledgers`, one per (device, epoch).
#[must_use]
pub fn audit<'a>(ledgers: impl IntoIterator<Item = &'a Ledger>) -> Report {
    let mut report = Report::default();
    for ledger in ledgers {
        check(ledger, &mut report);
    }
    report.balanced = report.missing.is_empty()
        && report.double.is_empty()
        && report.unflagged.is_empty()
        && report.over_acked.is_empty();
    report
}

fn check(ledger: &Ledger, report: &mut Report) {
    let flagged = RangeSet::from_range(1..=ledger.flagged);
    let mut settled = ledger.ingested.clone();
    let mut double = RangeSet::new();
    for (reason, numbers) in &ledger.lost {
        double = double.union(&settled.intersection(numbers));
        settled = settled.union(numbers);
        *report.dropped.entry(reason.clone()).or_default() += numbers.len();
    }
    let spooled = ledger.spooled.difference(&settled);
    let known = settled.union(&spooled);

    report.flagged += flagged.len();
    report.ingested += ledger.ingested.len();
    report.spooled += spooled.len();
    let finding = |ranges: RangeSet| Finding {
        device: ledger.device.clone(),
        epoch: ledger.epoch,
        ranges,
    };
    let missing = flagged.difference(&known);
    if !missing.is_empty() {
        report.missing.push(finding(missing));
    }
    if !double.is_empty() {
        report.double.push(finding(double));
    }
    let unflagged = known.difference(&flagged);
    if !unflagged.is_empty() {
        report.unflagged.push(finding(unflagged));
    }
    if u64::from(ledger.acked) > settled.len() {
        report.over_acked.push((
            ledger.device.clone(),
            ledger.epoch,
            ledger.acked,
            settled.len(),
        ));
    }
}

impl std::fmt::Display for Report {
    /// One line: `flagged 10 = ingested 7 + spooled 1 + dropped 2 (evicted 2): balanced`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dropped: u64 = self.dropped.values().sum();
        write!(
            f,
            "flagged {} = ingested {} + spooled {} + dropped {dropped}",
            self.flagged, self.ingested, self.spooled
        )?;
        let mut separator = " (";
        for (reason, count) in &self.dropped {
            write!(f, "{separator}{reason} {count}")?;
            separator = ", ";
        }
        if !self.dropped.is_empty() {
            write!(f, ")")?;
        }
        if self.balanced {
            return write!(f, ": balanced");
        }
        let count = |findings: &[Finding]| findings.iter().map(|x| x.ranges.len()).sum::<u64>();
        write!(
            f,
            ": NOT balanced (missing {}, double {}, never flagged {}, over-acknowledged epochs {})",
            count(&self.missing),
            count(&self.double),
            count(&self.unflagged),
            self.over_acked.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ledger() -> Ledger {
        Ledger {
            device: "cam-1".into(),
            epoch: 3,
            flagged: 10,
            acked: 6,
            ingested: (1..=6).collect(),
            spooled: (6..=8).collect(),
            lost: BTreeMap::from([
                ("evicted".to_owned(), (9..=9).collect()),
                ("crash".to_owned(), (10..=10).collect()),
            ]),
        }
    }

    #[test]
    fn in_flight_counts_once_as_ingested() {
        let report = audit([&ledger()]);
        assert!(report.balanced, "{report}");
        assert_eq!(
            (report.flagged, report.ingested, report.spooled),
            (10, 6, 2)
        );
        assert_eq!(
            report.to_string(),
            "flagged 10 = ingested 6 + spooled 2 + dropped 2 (crash 1, evicted 1): balanced"
        );
    }

    #[test]
    fn each_violation_is_named() {
        let mut hole = ledger();
        hole.spooled = (6..=7).collect();
        let report = audit([&hole, &ledger()]);
        assert!(!report.balanced);
        assert_eq!(report.missing[0].ranges.ranges(), &[(8, 8)]);
        assert_eq!(report.missing[0].epoch, 3);

        let mut twice = ledger();
        twice
            .lost
            .insert("crash".into(), (10..=10).chain(4..=5).collect());
        assert_eq!(audit([&twice]).double[0].ranges.ranges(), &[(4, 5)]);

        let mut two_reasons = ledger();
        two_reasons.lost.insert("crash".into(), (9..=10).collect());
        assert_eq!(audit([&two_reasons]).double[0].ranges.ranges(), &[(9, 9)]);

        let mut above = ledger();
        above.ingested.insert(12);
        above.spooled.insert(0);
        assert_eq!(
            audit([&above]).unflagged[0].ranges.ranges(),
            &[(0, 0), (12, 12)]
        );

        let mut acked = ledger();
        acked.acked = 9;
        assert_eq!(
            audit([&acked]).over_acked,
            vec![("cam-1".to_owned(), 3, 9, 8)]
        );
    }

    #[test]
    fn a_loss_is_booked_once_and_never_over_an_ingested_sample() {
        let mut ledger = ledger();
        assert!(!ledger.lose(2, "evicted"));
        assert!(!ledger.lose(9, "crash"));
        assert!(ledger.lose(8, "evicted"));
        assert!(ledger.lose(7, "new reason"));
        let report = audit([&ledger]);
        assert!(report.balanced, "{report}");
        assert_eq!(report.spooled, 0);
    }

    proptest! {
        /// Each number gets one fate; the audit balances, and forgetting any one fate unbalances it.
        #[test]
        fn balances_exactly_when_every_number_has_a_fate(
            fates in prop::collection::vec(0_u8..5, 1..60),
            forget in any::<prop::sample::Index>(),
        ) {
            let book = |skip: Option<usize>| {
                let mut ledger = Ledger {
                    device: "d".into(),
                    flagged: u32::try_from(fates.len()).unwrap(),
                    ..Ledger::default()
                };
                for (i, fate) in fates.iter().enumerate() {
                    if skip == Some(i) {
                        continue;
                    }
                    let n = u32::try_from(i).unwrap() + 1;
                    match fate {
                        0 => drop(ledger.ingested.insert(n)),
                        1 => drop(ledger.spooled.insert(n)),
                        2 => drop(ledger.lose(n, "evicted")),
                        3 => drop(ledger.lose(n, "crash")),
                        _ => {
                            ledger.ingested.insert(n);
                            ledger.spooled.insert(n);
                        }
                    }
                }
                ledger
            };
            let report = audit([&book(None)]);
            prop_assert!(report.balanced);
            prop_assert_eq!(
                report.flagged,
                report.ingested + report.spooled + report.dropped.values().sum::<u64>()
            );
            let hole = forget.index(fates.len());
            let report = audit([&book(Some(hole))]);
            prop_assert!(!report.balanced);
            prop_assert_eq!(
                report.missing[0].ranges.iter().collect::<Vec<_>>(),
                vec![u32::try_from(hole).unwrap() + 1]
            );
        }
    }
}
