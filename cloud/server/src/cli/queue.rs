//! `flywheel queue`: the labelling queue in a terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Subcommand;

use super::format::{self, percent};
use super::{Connection, print_json, print_line};
use crate::api::types::{LabelRequest, NextRequest, QueueItem, QueueStats, SkipRequest};
use crate::client::{Client, ClientError};

/// Parts of `flywheel queue`.
#[derive(Subcommand)]
pub enum QueueCommand {
    /// List the queue in the order in which it is handed out.
    #[command(after_help = "Example: flywheel queue ls --state pending --limit 20")]
    Ls {
        /// Only items in this state: pending, leased, labelled or skipped.
        #[arg(long)]
        state: Option<String>,
        /// At most so many.
        #[arg(long, default_value_t = 20)]
        limit: u32,
    },
    /// Take the next items on lease and show their pictures.
    #[command(after_help = "Example: flywheel queue next --worker ann --count 5 --json")]
    Next {
        /// Who labels.
        #[arg(long, env = "USER", default_value = "me")]
        worker: String,
        /// How many.
        #[arg(long, default_value_t = 1)]
        count: u32,
    },
    /// Label an item; without arguments, work through the queue by number keys.
    #[command(
        after_help = "Examples:\n  flywheel queue label            work through the queue\n  flywheel queue label 17 stop    label one item"
    )]
    Label {
        /// The item's number.
        #[arg(requires = "class")]
        item: Option<u64>,
        /// Its class; a new name makes a new class.
        class: Option<String>,
        /// Who labels.
        #[arg(long, env = "USER", default_value = "me")]
        worker: String,
    },
    /// Put an item aside, with a reason.
    #[command(after_help = "Example: flywheel queue skip 17 --reason 'no sign in it'")]
    Skip {
        /// The item's number.
        item: u64,
        /// Why.
        #[arg(long)]
        reason: String,
        /// Who skips.
        #[arg(long, env = "USER", default_value = "me")]
        worker: String,
    },
    /// The queue in numbers.
    #[command(after_help = "Example: flywheel queue stats")]
    Stats,
}

/// Runs the command.
///
/// # Errors
/// If the server can't be reached or refuses.
pub fn run(command: QueueCommand, connection: &Connection) -> Result<ExitCode> {
    let client = connection.client()?;
    match command {
        QueueCommand::Ls { state, limit } => {
            let mut path = format!("/v1/queue?limit={limit}");
            if let Some(state) = &state {
                path.push_str(&format!("&state={state}"));
            }
            let items: Vec<QueueItem> = client.get(&path)?;
            if connection.json {
                return print_json(&items).map(|()| ExitCode::SUCCESS);
            }
            let mut table = format::table(&[
                "item", "state", "guess", "device", "frame", "lane", "label", "why",
            ]);
            for item in &items {
                table.add_row([
                    item.id.to_string(),
                    item.state.clone(),
                    guess(item),
                    item.device.clone(),
                    item.frame.to_string(),
                    item.lane.clone(),
                    item.class.clone().unwrap_or_default(),
                    item.why.clone(),
                ]);
            }
            print_line(table)?;
        }
        QueueCommand::Next { worker, count } => {
            let items = lease(&client, &worker, count)?;
            if connection.json {
                return print_json(&items).map(|()| ExitCode::SUCCESS);
            }
            if items.is_empty() {
                print_line("Nothing waits for a label.")?;
            }
            for item in &items {
                show(&client, item)?;
            }
        }
        QueueCommand::Label {
            item,
            class,
            worker,
        } => match (item, class) {
            (Some(item), Some(class)) => {
                let labelled: QueueItem = client.post(
                    "/v1/queue/label",
                    &LabelRequest {
                        item,
                        worker,
                        class,
                    },
                )?;
                if connection.json {
                    print_json(&labelled)?;
                } else {
                    print_line(format!(
                        "{} is {}",
                        labelled.id,
                        labelled.class.unwrap_or_default()
                    ))?;
                }
            }
            _ => work(&client, &worker)?,
        },
        QueueCommand::Skip {
            item,
            reason,
            worker,
        } => {
            let skipped: QueueItem = client.post(
                "/v1/queue/skip",
                &SkipRequest {
                    item,
                    worker,
                    reason,
                },
            )?;
            if connection.json {
                print_json(&skipped)?;
            } else {
                print_line(format!("{} put aside", skipped.id))?;
            }
        }
        QueueCommand::Stats => {
            let stats: QueueStats = client.get("/v1/queue/stats")?;
            if connection.json {
                return print_json(&stats).map(|()| ExitCode::SUCCESS);
            }
            print_line(format!(
                "{} pending, {} leased, {} labelled, {} skipped",
                stats.pending, stats.leased, stats.labelled, stats.skipped
            ))?;
            let mut table = format::table(&["class", "labels"]);
            for class in &stats.classes {
                let count = stats.by_class.get(class).copied().unwrap_or(0);
                table.add_row([class.clone(), count.to_string()]);
            }
            print_line(table)?;
            let mut table = format::table(&["worker", "labels"]);
            for (worker, count) in &stats.by_worker {
                table.add_row([worker.clone(), count.to_string()]);
            }
            print_line(table)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn lease(client: &Client, worker: &str, count: u32) -> Result<Vec<QueueItem>> {
    Ok(client.post(
        "/v1/queue/next",
        &NextRequest {
            worker: worker.to_owned(),
            count: Some(count),
            lease_s: None,
        },
    )?)
}

fn guess(item: &QueueItem) -> String {
    match (&item.guess, item.confidence) {
        (Some(class), Some(confidence)) => format!("{class} {}", percent(f64::from(confidence))),
        (Some(class), None) => class.clone(),
        _ => String::new(),
    }
}

/// The picture, where to open it, and what is known about it.
fn show(client: &Client, item: &QueueItem) -> Result<()> {
    let png = match client.get_bytes(&item.picture) {
        Ok(png) => Some(png),
        // A damaged picture can still be put aside.
        Err(error @ ClientError::Refused { .. }) => {
            print_line(format!("item {}: {error}", item.id))?;
            None
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(png) = &png {
        format::show_picture(png);
    }
    print_line(format!(
        "item {}: {}×{} from {}, frame {}, lane {}; guess: {}; {}",
        item.id,
        item.width,
        item.height,
        item.device,
        item.frame,
        item.lane,
        guess(item),
        item.why
    ))?;
    let Some(png) = png else {
        return Ok(());
    };
    // A file can be opened by any viewer without a token; only its owner may read it.
    let mut file = tempfile::Builder::new()
        .prefix(&format!("flywheel-item-{}-", item.id))
        .suffix(".png")
        .tempfile()
        .context("cannot make a temporary file for the picture")?;
    file.write_all(&png)
        .context("cannot write the picture to a temporary file")?;
    let (_, path) = file
        .keep()
        .context("cannot keep the picture's temporary file")?;
    print_line(format!(
        "picture: {}   {}{}",
        path.display(),
        client.server(),
        item.picture
    ))
}

/// The loop of a person at a terminal (or of a program at a pipe): a picture, a line of answer.
fn work(client: &Client, worker: &str) -> Result<()> {
    let interactive = std::io::stdin().is_terminal();
    let mut lines = std::io::stdin().lock().lines();
    let mut done = 0u32;
    loop {
        let Some(item) = lease(client, worker, 1)?.into_iter().next() else {
            return print_line(format!("Nothing waits for a label; {done} labelled."));
        };
        let stats: QueueStats = client.get("/v1/queue/stats")?;
        show(client, &item)?;
        for (number, class) in stats.classes.iter().enumerate() {
            print_line(format!("  {:>2}  {class}", number + 1))?;
        }
        print_line(format!(
            "number or name of the class, Enter for the guess, s REASON to skip, q to quit ({} left)",
            stats.pending
        ))?;
        let answer = loop {
            if interactive {
                print!("> ");
                std::io::stdout().flush()?;
            }
            let Some(line) = lines.next() else {
                return Ok(());
            };
            match parse_answer(&line?, &item, &stats.classes) {
                Ok(answer) => break answer,
                Err(error) if interactive => print_line(error)?,
                Err(error) => return Err(error),
            }
        };
        match answer {
            Answer::Quit => return print_line(format!("{done} labelled.")),
            Answer::Skip(reason) => {
                let _: QueueItem = client.post(
                    "/v1/queue/skip",
                    &SkipRequest {
                        item: item.id,
                        worker: worker.to_owned(),
                        reason,
                    },
                )?;
            }
            Answer::Class(class) => {
                let _: QueueItem = client.post(
                    "/v1/queue/label",
                    &LabelRequest {
                        item: item.id,
                        worker: worker.to_owned(),
                        class,
                    },
                )?;
                done += 1;
            }
        }
    }
}

#[derive(Debug, PartialEq)]
enum Answer {
    Class(String),
    Skip(String),
    Quit,
}

fn parse_answer(line: &str, item: &QueueItem, classes: &[String]) -> Result<Answer> {
    let line = line.trim();
    if line == "q" {
        return Ok(Answer::Quit);
    }
    if line.is_empty() {
        return item
            .guess
            .clone()
            .map(Answer::Class)
            .context("there is no guess for this item; type a number or a name");
    }
    if line == "s" {
        bail!("a skip needs a reason: s REASON");
    }
    if let Some(reason) = line.strip_prefix("s ") {
        return Ok(Answer::Skip(reason.trim().to_owned()));
    }
    match line.parse::<usize>() {
        Ok(number) => number
            .checked_sub(1)
            .and_then(|at| classes.get(at))
            .cloned()
            .map(Answer::Class)
            .with_context(|| {
                format!(
                    "{number} is not on the list; numbers go from 1 to {}",
                    classes.len()
                )
            }),
        Err(_) => Ok(Answer::Class(line.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item() -> QueueItem {
        QueueItem {
            id: 1,
            picture: String::new(),
            width: 1,
            height: 1,
            device: String::new(),
            frame: 0,
            captured_ms: 0,
            lane: String::new(),
            guess: Some("stop".to_owned()),
            confidence: None,
            why: String::new(),
            state: String::new(),
            worker: None,
            class: None,
            lease_until_ms: None,
        }
    }

    #[test]
    fn answers_are_numbers_names_and_skips() {
        let classes = ["stop".to_owned(), "yield".to_owned()];
        let parse = |line: &str| parse_answer(line, &item(), &classes);
        assert_eq!(parse("2").unwrap(), Answer::Class("yield".to_owned()));
        assert_eq!(parse("deer\n").unwrap(), Answer::Class("deer".to_owned()));
        assert_eq!(parse("").unwrap(), Answer::Class("stop".to_owned()));
        assert_eq!(
            parse("s too dark").unwrap(),
            Answer::Skip("too dark".to_owned())
        );
        assert_eq!(parse("q").unwrap(), Answer::Quit);
        assert!(parse("0").is_err());
        assert!(parse("3").unwrap_err().to_string().contains("1 to 2"));
        assert!(parse("s").is_err());
    }
}
