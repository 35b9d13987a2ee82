//! A rollout live: a bar for each wave and every failure with its reason, or plain lines where
//! standard output is no terminal.

use std::collections::BTreeSet;
use std::io::IsTerminal;

use anyhow::{Context, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{find, headline, words};
use crate::api::types::RolloutView;
use crate::cli::print_line;
use crate::client::Client;

/// Longest that the server holds an answer back.
const WAIT_MS: u32 = 500;

/// Watches a rollout until it has ended and every device that can be reached has gone back, if any
/// had to. Returns it with its devices.
pub(super) fn until_it_ends(client: &Client, id: Option<u64>, quiet: bool) -> Result<RolloutView> {
    let mut rollout = find(client, id, 0, true)?;
    let mut screen = match quiet {
        true => Screen::Quiet,
        false if std::io::stdout().is_terminal() => Screen::bars(),
        false => Screen::Lines(String::new()),
    };
    let mut failed = BTreeSet::new();
    loop {
        for (device, progress) in &rollout.failures {
            if failed.insert((device.clone(), progress.state.clone())) {
                let reason = progress.detail.as_deref().unwrap_or("no reason given");
                screen.note(&format!("{device} {}: {reason}", progress.state))?;
            }
        }
        screen.draw(&rollout)?;
        let goes_on = matches!(rollout.state.as_str(), "running" | "paused")
            || rollout.returning > rollout.returning_away;
        if !goes_on {
            screen.clear()?;
            return find(client, Some(rollout.id), 0, false);
        }
        rollout = find(client, Some(rollout.id), WAIT_MS, true)?;
    }
}

enum Screen {
    Quiet,
    /// The last line printed.
    Lines(String),
    Bars {
        all: MultiProgress,
        title: ProgressBar,
        waves: Vec<ProgressBar>,
    },
}

impl Screen {
    fn bars() -> Self {
        let all = MultiProgress::with_draw_target(ProgressDrawTarget::stdout());
        let title = all.add(ProgressBar::no_length());
        Self::Bars {
            all,
            title,
            waves: Vec::new(),
        }
    }

    fn note(&self, line: &str) -> Result<()> {
        match self {
            Self::Quiet => Ok(()),
            Self::Lines(_) => print_line(line),
            Self::Bars { all, .. } => Ok(all.println(line)?),
        }
    }

    fn draw(&mut self, rollout: &RolloutView) -> Result<()> {
        match self {
            Self::Quiet => {}
            Self::Lines(shown) => {
                let line = format!(
                    "{} wave {}: {}",
                    rollout.state,
                    rollout.wave,
                    super::tally(rollout)
                );
                if line != *shown {
                    print_line(&line)?;
                    *shown = line;
                }
            }
            Self::Bars { all, title, waves } => {
                title.set_style(ProgressStyle::with_template("{wide_msg}").context("a template")?);
                title.set_message(headline(rollout));
                for (number, wave) in rollout.waves.iter().enumerate() {
                    if waves.len() <= number {
                        let bar = all.add(ProgressBar::new(wave.devices));
                        bar.set_style(style()?);
                        bar.set_prefix(match number {
                            0 => "canary".to_owned(),
                            number => format!("wave {number}"),
                        });
                        waves.push(bar);
                    }
                    let at = |state: &str| wave.states.get(state).copied().unwrap_or(0);
                    let bar = &waves[number];
                    bar.set_length(wave.devices);
                    bar.set_position(at("confirmed") + at("returned"));
                    bar.set_message(words(&wave.states));
                }
            }
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        if let Self::Bars { all, .. } = self {
            all.clear()?;
        }
        Ok(())
    }
}

fn style() -> Result<ProgressStyle> {
    ProgressStyle::with_template("{prefix:>8} {bar:32} {pos}/{len} {msg}")
        .context("the progress bar's template")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_bar_has_a_template() {
        assert!(super::style().is_ok());
    }
}
