//! The processes of the demo: started, watched, started again when they die, and ended together.
//!
//! Children read from a pipe that the demo holds and end when it closes, so that none outlives
//! the demo whatever becomes of it.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Set for children: they end when their standard input does.
pub const LIFELINE: &str = "FLYWHEEL_LIFELINE";
/// How often a child is looked at.
const WATCH: Duration = Duration::from_millis(50);
/// A child that dies so often within [`LOOP_WINDOW`] is given up.
const LOOP_DEATHS: usize = 5;
/// See [`LOOP_DEATHS`].
const LOOP_WINDOW: Duration = Duration::from_secs(10);
/// How long a child may take to end by itself.
const FAREWELL: Duration = Duration::from_secs(5);

/// What one process is.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name in messages and of its log file.
    pub name: String,
    /// Arguments of this very program.
    pub args: Vec<String>,
    /// Where its output goes.
    pub log: PathBuf,
}

/// A process that is kept running.
pub struct Process {
    spec: Spec,
    child: Arc<Mutex<Child>>,
    ending: Arc<AtomicBool>,
    lost: Arc<AtomicBool>,
    restarts: Arc<AtomicU32>,
    watcher: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts a process and keeps it running.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start(spec: Spec) -> Result<Self> {
        let child = Arc::new(Mutex::new(spawn(&spec)?));
        let ending = Arc::new(AtomicBool::new(false));
        let lost = Arc::new(AtomicBool::new(false));
        let restarts = Arc::new(AtomicU32::new(0));
        let watcher = {
            let (spec, child, ending) = (spec.clone(), child.clone(), ending.clone());
            let (lost, restarts) = (lost.clone(), restarts.clone());
            std::thread::Builder::new()
                .name(format!("watch {}", spec.name))
                .spawn(move || watch(&spec, &child, &ending, &lost, &restarts))
                .context("cannot start a watcher thread")?
        };
        Ok(Self {
            spec,
            child,
            ending,
            lost,
            restarts,
            watcher: Some(watcher),
        })
    }

    /// How often it was started again.
    pub fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// Its process id now.
    pub fn pid(&self) -> u32 {
        lock(&self.child).id()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Kills it with SIGKILL; the watcher starts it again.
    pub fn kill(&self) {
        // It may have ended by itself in this moment, which comes to the same.
        let _ = lock(&self.child).kill();
    }

    /// Fails once the process can't be kept running.
    ///
    /// # Errors
    /// Names the log to read.
    pub fn check(&self) -> Result<()> {
        if self.lost.load(Ordering::Relaxed) {
            bail!(
                "{} keeps dying; see {}:\n{}",
                self.spec.name,
                self.spec.log.display(),
                tail(&self.spec.log)
            );
        }
        Ok(())
    }

    /// Lets it end by itself, then makes it end.
    fn end(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        drop(lock(&self.child).stdin.take());
        let started = Instant::now();
        while started.elapsed() < FAREWELL {
            if matches!(lock(&self.child).try_wait(), Ok(Some(_)) | Err(_)) {
                break;
            }
            std::thread::park_timeout(WATCH);
        }
        let mut child = lock(&self.child);
        let _ = child.kill();
        let _ = child.wait();
        drop(child);
        if let Some(watcher) = self.watcher.take() {
            watcher.thread().unpark();
            let _ = watcher.join();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

fn watch(
    spec: &Spec,
    child: &Mutex<Child>,
    ending: &AtomicBool,
    lost: &AtomicBool,
    restarts: &AtomicU32,
) {
    let mut deaths: Vec<Instant> = Vec::new();
    while !ending.load(Ordering::Relaxed) {
        std::thread::park_timeout(WATCH);
        let mut child = lock(child);
        if !matches!(child.try_wait(), Ok(Some(_))) || ending.load(Ordering::Relaxed) {
            continue;
        }
        deaths.retain(|death| death.elapsed() < LOOP_WINDOW);
        deaths.push(Instant::now());
        match spawn(spec) {
            Ok(next) if deaths.len() < LOOP_DEATHS => {
                *child = next;
                restarts.fetch_add(1, Ordering::Relaxed);
            }
            _ => {
                lost.store(true, Ordering::Relaxed);
                return;
            }
        }
    }
}

fn spawn(spec: &Spec) -> Result<Child> {
    let program = std::env::current_exe().context("cannot find the program itself")?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&spec.log)
        .with_context(|| format!("cannot write {}", spec.log.display()))?;
    Command::new(program)
        .args(&spec.args)
        .env(LIFELINE, "1")
        .stdin(Stdio::piped())
        .stdout(
            log.try_clone()
                .context("cannot share the log file between outputs")?,
        )
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", spec.name))
}

/// In a child: ends the process when the demo's end of the pipe closes.
pub fn hold_lifeline() {
    if std::env::var_os(LIFELINE).is_none() {
        return;
    }
    let wait = || {
        let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
        std::process::exit(0);
    };
    if let Err(error) = std::thread::Builder::new()
        .name("lifeline".to_owned())
        .spawn(wait)
    {
        eprintln!("flywheel: no lifeline: {error}");
    }
}

/// The last lines of a log.
pub fn tail(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

fn lock(child: &Mutex<Child>) -> std::sync::MutexGuard<'_, Child> {
    child.lock().unwrap_or_else(PoisonError::into_inner)
}
