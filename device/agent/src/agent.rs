//! Putting an agent together and ending it in good order.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use device_core::pace::Pace;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::capture::Capturer;
use crate::config::Config;
use crate::identity::{Identity, IdentityError, install_crypto};
use crate::link::{Link, LinkConfig};
use crate::metrics::{expose::About, serve};
use crate::models::{Device, LoadError, Models, ModelsError, Runner};
use crate::notify::{Notifier, Watchdog};
use crate::pipeline::{Feed, Pipeline, PipelineError};
use crate::shared::{Shared, Status, lock};
use crate::source::{self, SourceError};
use crate::spool::{Folder, Spool, SpoolError, last_epoch};
use crate::state::{State, StateError};

/// Bytes in a megabyte.
const MB: u64 = 1_000_000;

/// Why an agent does not run or ended.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The device is not enrolled, or its identity is damaged.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The database or the lock on the data folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// The spool.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The spool's folder.
    #[error("{path}: cannot open the spool: {source}")]
    SpoolFolder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The models.
    #[error(transparent)]
    Models(#[from] ModelsError),
    /// The second model that the configuration names.
    #[error("configuration: `shadow_model`: {0}")]
    Shadow(LoadError),
    /// The source of frames.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A source whose frames come by themselves can't be halted.
    #[error(
        "configuration: `pace` is \"lockstep\", but the frames of {0:?} come when they come; write pace = 30, or \"max\" to take each as it comes"
    )]
    Lockstep(String),
    /// The metrics' port.
    #[error("configuration: `metrics`: cannot listen on {address}: {source}")]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The frame loop.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// The operating system gives no threads or signals.
    #[error("cannot start: {0}")]
    System(std::io::Error),
    /// A thread died; samples are safe on disk, and a restart goes on from there.
    #[error("the {0} panicked; this is a bug in the agent")]
    Panicked(&'static str),
}

/// How long an agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Until SIGTERM or SIGINT.
    Forever,
    /// This many frames from where the source was left, then until everything flagged is
    /// acknowledged.
    Once {
        /// Number of frames.
        frames: u64,
    },
}

/// Runs an agent until SIGTERM or SIGINT, or until `mode` is fulfilled.
///
/// # Errors
/// [`AgentError`], in words that name the file and what to do.
pub fn run(config: &Config, mode: Mode) -> Result<(), AgentError> {
    let notifier = Notifier::from_env();
    let stop = async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    };
    run_watched(config, mode, &notifier, stop)
}

/// Runs an agent until `stop` completes, or until `mode` is fulfilled; then it takes its leave.
///
/// # Errors
/// As [`run`], and that of `stop`.
pub fn run_until(
    config: &Config,
    mode: Mode,
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), AgentError> {
    run_watched(config, mode, &Notifier::none(), stop)
}

/// As [`run_until`], and tells `notifier` how it is.
///
/// # Errors
/// As [`run_until`].
pub fn run_watched(
    config: &Config,
    mode: Mode,
    notifier: &Notifier,
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), AgentError> {
    install_crypto();
    let identity = Arc::new(Identity::load(&config.data)?);
    let state = Arc::new(State::open(&config.data)?);
    let mut source = source::open(&config.source)?;
    if mode == Mode::Forever && config.pace == Pace::Lockstep && source.is_live() {
        return Err(AgentError::Lockstep(config.source.clone()));
    }
    source.resume(&state.mark(&config.source)?);
    let device = Device {
        id: identity.device.clone(),
        hardware: config.hardware.clone(),
        trust: identity.trust.clone(),
    };
    let (shared, live, epoch) = open(config, device, &state)?;
    let shadow = match &config.shadow_model {
        Some(folder) => {
            let loader = lock(&shared.models).loader();
            match loader.prove_at(folder) {
                Ok(runner) => Some(runner),
                // A rotated release key must not end an agent in the field.
                Err(error) if error.is_unsigned() => {
                    tracing::error!(%error, "running without the second model");
                    None
                }
                Err(error) => return Err(AgentError::Shadow(error)),
            }
        }
        None => None,
    };
    tracing::info!(
        device = %identity.device,
        epoch,
        frame = shared.status().progress.frame,
        source = config.source,
        engine = config.engine.name(),
        "agent starts"
    );
    let pace = match mode {
        Mode::Forever => config.pace,
        Mode::Once { frames } => {
            let until = shared.status().progress.frame.saturating_add(frames);
            shared.signal(|signals| signals.run_until = until);
            Pace::Lockstep
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("flywheel-link")
        .enable_all()
        .build()
        .map_err(AgentError::System)?;
    if let Some(address) = config.metrics {
        let refused = |source| AgentError::Metrics { address, source };
        let listener = runtime
            .block_on(TcpListener::bind(address))
            .map_err(refused)?;
        let about = About {
            device: identity.device.to_string(),
            source: config.source.clone(),
            engine: config.engine.name().to_owned(),
        };
        runtime.spawn(serve::serve(listener, Arc::clone(&shared), about));
    }
    let feed = match pace {
        Pace::Fps(fps) => {
            let first = shared.status().progress.frame;
            let capturer = Capturer::new(source, fps, first, config.capture_frames);
            let shelf = capturer.shelf();
            // It ends with the source or when told to stop; nothing waits for it.
            drop(
                capturer
                    .spawn(Arc::clone(&shared))
                    .map_err(AgentError::System)?,
            );
            Feed::Shelf(shelf)
        }
        Pace::Lockstep | Pace::Max => Feed::Direct(source),
    };
    let pipeline =
        Pipeline::new(config, pace, feed, live, Arc::clone(&shared))?.with_shadow(shadow);
    let settings = LinkConfig {
        identity,
        config: config.clone(),
        epoch,
        obey_run_until: mode == Mode::Forever,
    };
    let driven = async {
        tokio::select! {
            result = drive(settings, Arc::clone(&shared), pipeline, mode, notifier, stop) => result,
            never = feed_watchdog(notifier, &shared) => match never {},
        }
    };
    let result = runtime.block_on(driven);
    // For the capture thread, whatever ended the frame loop.
    shared.signal(|signals| signals.stop = true);
    // A proof that is still computing is not waited for.
    runtime.shutdown_background();
    state.flush()?;
    tracing::info!("agent ends");
    result
}

/// Feeds systemd's watchdog while frames advance.
async fn feed_watchdog(notifier: &Notifier, shared: &Shared) -> std::convert::Infallible {
    let Some(interval) = notifier.interval() else {
        return std::future::pending().await;
    };
    let mut watchdog = Watchdog::default();
    let mut ticks = tokio::time::interval(interval);
    loop {
        ticks.tick().await;
        if watchdog.feed(shared.beats(), shared.status().held) {
            notifier.alive();
        } else {
            tracing::warn!("no frame since the last look; the watchdog is not fed");
        }
    }
}

/// Opens everything in the data folder that outlives the process.
pub(crate) fn open(
    config: &Config,
    device: Device,
    state: &Arc<State>,
) -> Result<(Arc<Shared>, Option<Runner>, u32), AgentError> {
    let path = config.data.join("spool");
    let folder = Folder::open(&path).map_err(|source| AgentError::SpoolFolder { path, source })?;
    let epoch = state.next_epoch(last_epoch(&folder)?)?;
    let (spool, recovery) = Spool::open(
        Box::new(folder),
        state.ledger()?,
        epoch,
        u64::from(config.spool.quota_mb) * MB,
    )?;
    if recovery.held > 0 {
        tracing::info!(
            held = recovery.held,
            crashed = recovery.crashed,
            corrupt = recovery.corrupt,
            "records of earlier starts are in the spool"
        );
    }
    let (models, live) = Models::open(&config.data, Arc::clone(state), device, config.engine)?;
    let status = Status {
        progress: state.progress(&config.source),
        held: false,
        live: models.record().live,
        engine: live.as_ref().map(Runner::engine),
    };
    let bytes_up = state.bytes_up();
    let shared = Shared::new(Arc::clone(state), spool, models, status, bytes_up);
    Ok((Arc::new(shared), live, epoch))
}

/// Runs both threads until something ends one of them, then ends the other.
async fn drive(
    settings: LinkConfig,
    shared: Arc<Shared>,
    pipeline: Pipeline,
    mode: Mode,
    notifier: &Notifier,
    stop: impl Future<Output = std::io::Result<()>>,
) -> Result<(), AgentError> {
    let (stop_link, link_stopped) = oneshot::channel();
    let (link, mut idle) = Link::new(settings, Arc::clone(&shared));
    let mut link = tokio::spawn(link.run(link_stopped));
    let (ended, mut frames_ended) = oneshot::channel();
    thread::Builder::new()
        .name("flywheel-frames".to_owned())
        .spawn(move || {
            // Nobody listens only if the process is ending already.
            let _ = ended.send(pipeline.run());
        })
        .map_err(AgentError::System)?;
    notifier.ready();

    let drained = async {
        match mode {
            Mode::Forever => std::future::pending().await,
            // The sender lives as long as the link.
            Mode::Once { .. } => drop(idle.wait_for(|idle| *idle).await),
        }
    };
    let mut stopped = Ok(());
    let early = tokio::select! {
        result = stop => {
            stopped = result;
            None
        }
        () = drained => None,
        result = &mut frames_ended => Some(result),
        // It returns only when told to, so this is a panic, and the agent must not go on mute.
        _ = &mut link => {
            shared.signal(|signals| signals.stop = true);
            let _ = frames_ended.await;
            return Err(AgentError::Panicked("link"));
        }
    };
    notifier.stopping();
    shared.signal(|signals| signals.stop = true);
    let result = match early {
        Some(result) => result,
        None => frames_ended.await,
    };
    let _ = stop_link.send(());
    let _ = link.await;
    match result {
        Ok(result) => result?,
        Err(_) => return Err(AgentError::Panicked("frame loop")),
    }
    stopped.map_err(AgentError::System)
}
