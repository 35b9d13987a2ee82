//! Which devices a rollout is for, in words: a group, labels, hardware and health. The answer is
//! looked up anew at every pass, so a device that is enrolled, tagged or mended later is in.

use super::{Device, RolloutError};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A device that was heard of within this time, in ms, is healthy while it is connected.
const HEALTHY_MS: u64 = 5 * 60 * 1000;

/// Terms of which all must hold, separated by commas:
///
/// - `all`; `NAME` or `group=NAME`; `device=ID`; `hardware=NAME`; `engine=NAME`; `label.KEY=VALUE`.
///   `a|b` stands for either; `!=` negates.
/// - `label.KEY`: the label is there, whatever its value.
/// - `online`; `healthy`: connected and heard of within 5 minutes. `!` in front negates.
/// - `sequence`, `restarts`, `skipped`, `silent_s` with `<`, `<=`, `>`, `>=` or `=` and a number:
///   release it runs, boots so far, frames it could not read, seconds since it was heard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Selector {
    text: String,
    terms: Vec<Term>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Term {
    All,
    /// A text of the device is one of these, or is none of them.
    Is(Key, bool, Vec<String>),
    Label(String),
    Online(bool),
    Healthy(bool),
    Number(Fact, Order, u64),
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Key {
    Device,
    Group,
    Hardware,
    Engine,
    Label(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fact {
    Sequence,
    Restarts,
    Skipped,
    SilentSeconds,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Less,
    AtMost,
    More,
    AtLeast,
    Equal,
}

impl Selector {
    /// Every device.
    #[must_use]
    pub fn all() -> Self {
        Self {
            text: "all".to_owned(),
            terms: vec![Term::All],
        }
    }

    /// Whether the device belongs to the group, healthy or not.
    #[must_use]
    pub fn covers(&self, device: &Device) -> bool {
        let belongs = |term: &Term| term.is_passing() || term.holds(device);
        self.terms.iter().all(belongs)
    }

    /// Whether the device belongs to the group and its health is as asked.
    #[must_use]
    pub fn matches(&self, device: &Device) -> bool {
        self.terms.iter().all(|term| term.holds(device))
    }
}

impl Term {
    /// Whether it speaks of something that comes and goes by itself.
    const fn is_passing(&self) -> bool {
        matches!(self, Self::Online(_) | Self::Healthy(_) | Self::Number(..))
    }

    fn holds(&self, device: &Device) -> bool {
        match self {
            Self::All => true,
            Self::Is(key, wanted, values) => {
                let text = match key {
                    Key::Device => Some(&device.id),
                    Key::Group => Some(&device.group),
                    Key::Hardware => Some(&device.hardware),
                    Key::Engine => Some(&device.engine),
                    Key::Label(name) => device.labels.get(name),
                };
                text.is_some_and(|text| values.contains(text)) == *wanted
            }
            Self::Label(name) => device.labels.contains_key(name),
            Self::Online(wanted) => device.online == *wanted,
            Self::Healthy(wanted) => (device.online && device.silent_ms <= HEALTHY_MS) == *wanted,
            Self::Number(fact, order, limit) => {
                let value = match fact {
                    Fact::Sequence => device.sequence,
                    Fact::Restarts => u64::from(device.restarts),
                    Fact::Skipped => device.skipped,
                    Fact::SilentSeconds => device.silent_ms / 1000,
                };
                match order {
                    Order::Less => value < *limit,
                    Order::AtMost => value <= *limit,
                    Order::More => value > *limit,
                    Order::AtLeast => value >= *limit,
                    Order::Equal => value == *limit,
                }
            }
        }
    }

    fn parse(term: &str) -> Option<Self> {
        let name = |text: &str| {
            let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '/' | ' ');
            (!text.is_empty() && text.chars().all(plain)).then(|| text.to_owned())
        };
        if let Some(at) = term.find(['<', '>', '=']) {
            let (left, right) = term.split_at(at);
            if let Some(fact) = Fact::parse(left.trim()) {
                let (order, number) = Order::parse(right)?;
                return Some(Self::Number(fact, order, number.trim().parse().ok()?));
            }
        }
        if let Some((left, right)) = term.split_once('=') {
            let (left, wanted) = match left.strip_suffix('!') {
                Some(left) => (left, false),
                None => (left, true),
            };
            let values: Option<Vec<String>> = right.split('|').map(|v| name(v.trim())).collect();
            return Some(Self::Is(Key::parse(left.trim())?, wanted, values?));
        }
        let (word, wanted) = match term.strip_prefix('!') {
            Some(word) => (word.trim(), false),
            None => (term, true),
        };
        match word {
            "all" => wanted.then_some(Self::All),
            "online" => Some(Self::Online(wanted)),
            "healthy" => Some(Self::Healthy(wanted)),
            label if wanted && label.starts_with("label.") => {
                Some(Self::Label(name(&label["label.".len()..])?))
            }
            group => Some(Self::Is(Key::Group, wanted, vec![name(group)?])),
        }
    }
}

impl Key {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "device" => Self::Device,
            "group" => Self::Group,
            "hardware" => Self::Hardware,
            "engine" => Self::Engine,
            label => Self::Label(
                label
                    .strip_prefix("label.")
                    .filter(|l| !l.is_empty())?
                    .to_owned(),
            ),
        })
    }
}

impl Fact {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "sequence" => Self::Sequence,
            "restarts" => Self::Restarts,
            "skipped" => Self::Skipped,
            "silent_s" => Self::SilentSeconds,
            _ => return None,
        })
    }
}

impl Order {
    fn parse(text: &str) -> Option<(Self, &str)> {
        // The longer signs first: `<` is the beginning of `<=`.
        let signs = [
            ("<=", Self::AtMost),
            (">=", Self::AtLeast),
            ("<", Self::Less),
            (">", Self::More),
            ("=", Self::Equal),
        ];
        signs
            .into_iter()
            .find_map(|(sign, order)| Some((order, text.strip_prefix(sign)?)))
    }
}

impl FromStr for Selector {
    type Err = RolloutError;

    fn from_str(text: &str) -> Result<Self, RolloutError> {
        let terms = text.split(',').map(str::trim).map(|term| {
            Term::parse(term).ok_or_else(|| RolloutError::Selector {
                term: term.chars().take(80).collect(),
            })
        });
        Ok(Self {
            terms: terms.collect::<Result<_, _>>()?,
            text: text.to_owned(),
        })
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for Selector {
    type Error = RolloutError;

    fn try_from(text: String) -> Result<Self, RolloutError> {
        text.parse()
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> Device {
        Device {
            id: "cam7".into(),
            group: "north".into(),
            labels: [("site".to_owned(), "gate 3".to_owned())].into(),
            hardware: "pi4".into(),
            engine: "tract".into(),
            sequence: 3,
            online: true,
            silent_ms: 20_000,
            restarts: 4,
            skipped: 0,
        }
    }

    #[test]
    fn terms_hold_or_do_not() {
        let device = device();
        for (text, holds) in [
            ("all", true),
            ("north", true),
            ("south", false),
            ("!south", true),
            ("group=south|north", true),
            ("label.site=gate 3, hardware=pi4,healthy", true),
            ("label.site=gate 4", false),
            ("label.site!=gate 4", true),
            ("label.site", true),
            ("label.floor", false),
            ("label.floor!=1", true),
            ("device=cam7", true),
            ("engine!=burn-flex", true),
            ("online,!healthy", false),
            ("sequence<3", false),
            ("sequence<=3,restarts>=4,skipped=0,silent_s<60", true),
            ("restarts>4", false),
        ] {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(selector.matches(&device), holds, "{text}");
            assert_eq!(selector.to_string(), text);
        }
        let away = Device {
            online: false,
            ..device
        };
        let healthy: Selector = "north,healthy".parse().unwrap();
        assert!(healthy.covers(&away) && !healthy.matches(&away));
    }

    #[test]
    fn bad_terms_are_named() {
        for (text, term) in [
            ("", ""),
            ("north,", ""),
            ("colour=red", "colour=red"),
            ("north,sequence<x", "sequence<x"),
            ("hardware=", "hardware="),
            ("label.=3", "label.=3"),
            ("a?b", "a?b"),
            ("!all", "!all"),
        ] {
            match text.parse::<Selector>() {
                Err(RolloutError::Selector { term: found }) => assert_eq!(found, term),
                other => panic!("{text}: {other:?}"),
            }
        }
    }
}
