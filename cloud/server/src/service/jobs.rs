//! Long work on the server: training and evaluation, one at a time, surviving a restart.
//!
//! A job is stored before it starts and when it ends. A server that finds a job running when it
//! starts runs it again from the beginning: both kinds give the same result for the same request.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::training::{Run, Stations};
use super::{Fault, lock, now_ms};
use crate::api::types::{EvalRequest, JobView, TrainRequest};
use crate::cloud::Cloud;
use crate::store::Store;

const JOBS: &str = "jobs";

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Work {
    Train(TrainRequest),
    Eval(EvalRequest),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Outcome {
    Running,
    Done { model: String },
    Failed { error: String },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct JobRecord {
    number: u64,
    work: Work,
    outcome: Outcome,
    created_ms: u64,
    ended_ms: u64,
}

#[derive(Clone, Debug, Default)]
struct At {
    step: u64,
    steps: u64,
    message: String,
}

/// The jobs of a server.
pub struct Jobs {
    store: Arc<Store>,
    running: Mutex<BTreeMap<u64, watch::Sender<At>>>,
    /// Held while a job computes: two at once would only slow each other on the same cores.
    turn: Mutex<()>,
    creating: Mutex<()>,
}

impl Jobs {
    /// The jobs in a store.
    pub fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            running: Mutex::default(),
            turn: Mutex::default(),
            creating: Mutex::default(),
        }
    }

    /// Starts a training run.
    ///
    /// # Errors
    /// If the dataset does not exist or the store fails.
    pub fn train(cloud: &Arc<Cloud>, request: TrainRequest) -> Result<JobView, Fault> {
        cloud.catalog.find(&request.dataset)?;
        Self::start(cloud, Work::Train(request))
    }

    /// Starts an evaluation.
    ///
    /// # Errors
    /// If the model does not exist or the store fails.
    pub fn eval(cloud: &Arc<Cloud>, request: EvalRequest) -> Result<JobView, Fault> {
        cloud.registry.find(&request.model)?;
        Self::start(cloud, Work::Eval(request))
    }

    /// Starts again whatever a previous server left running.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn resume(cloud: &Arc<Cloud>) -> Result<(), Fault> {
        for (_, job) in cloud.store.scan::<JobRecord>(JOBS, &[])? {
            if job.outcome == Outcome::Running {
                tracing::info!(job = job.number, "running a job again that was cut short");
                Self::spawn(cloud, job);
            }
        }
        Ok(())
    }

    /// A job by number.
    ///
    /// # Errors
    /// If there is none.
    pub fn view(&self, id: &str) -> Result<JobView, Fault> {
        let job = self.record(id)?;
        let at = lock(&self.running)
            .get(&job.number)
            .map(|progress| progress.borrow().clone())
            .unwrap_or_default();
        let (state, model, error) = match &job.outcome {
            Outcome::Running => ("running", None, None),
            Outcome::Done { model } => ("done", Some(model.clone()), None),
            Outcome::Failed { error } => ("failed", None, Some(error.clone())),
        };
        let until = if job.ended_ms > 0 {
            job.ended_ms
        } else {
            now_ms()
        };
        Ok(JobView {
            id: job.number.to_string(),
            kind: match job.work {
                Work::Train(_) => "train",
                Work::Eval(_) => "eval",
            }
            .to_owned(),
            state: state.to_owned(),
            step: if job.ended_ms > 0 {
                at.steps.max(1)
            } else {
                at.step
            },
            steps: at.steps.max(1),
            message: at.message,
            model,
            error,
            seconds: until.saturating_sub(job.created_ms) as f64 / 1000.0,
        })
    }

    /// Something to wait on for a job's next step; absent when it is not running.
    pub fn changes(&self, id: &str) -> Option<watch::Receiver<impl Sized + use<>>> {
        let number = id.parse::<u64>().ok()?;
        lock(&self.running)
            .get(&number)
            .map(watch::Sender::subscribe)
    }

    fn record(&self, id: &str) -> Result<JobRecord, Fault> {
        let missing = || Fault::NotFound(format!("there is no job {id}"));
        let number: u64 = id.parse().map_err(|_| missing())?;
        self.store
            .get(JOBS, &number.to_be_bytes())?
            .ok_or_else(missing)
    }

    fn save(&self, job: &JobRecord) -> Result<(), Fault> {
        self.store.put(JOBS, &job.number.to_be_bytes(), job)?;
        self.store.flush()?;
        Ok(())
    }

    fn start(cloud: &Arc<Cloud>, work: Work) -> Result<JobView, Fault> {
        let jobs = &cloud.jobs;
        let job = {
            let _one_at_a_time = lock(&jobs.creating);
            let number = cloud
                .store
                .scan::<JobRecord>(JOBS, &[])?
                .last()
                .map_or(1, |(_, job)| job.number + 1);
            let job = JobRecord {
                number,
                work,
                outcome: Outcome::Running,
                created_ms: now_ms(),
                ended_ms: 0,
            };
            jobs.save(&job)?;
            job
        };
        let number = job.number;
        Self::spawn(cloud, job);
        jobs.view(&number.to_string())
    }

    fn spawn(cloud: &Arc<Cloud>, mut job: JobRecord) {
        let (progress, _) = watch::channel(At::default());
        lock(&cloud.jobs.running).insert(job.number, progress.clone());
        let cloud = Arc::clone(cloud);
        // A thread of its own: the work takes minutes and must not hold a runtime's worker.
        let body = move || {
            let started = Instant::now();
            let outcome = {
                let _turn = lock(&cloud.jobs.turn);
                // An engine that panics must not leave a job that runs for ever; the services
                // store whole records only, so nothing is left half done.
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    run(&cloud, &job.work, &mut |step, steps, message| {
                        progress.send_replace(At {
                            step,
                            steps,
                            message,
                        });
                    })
                }))
                .unwrap_or_else(|_| {
                    Err(Fault::Internal(
                        "the job panicked; see the server's log".to_owned(),
                    ))
                })
            };
            job.outcome = match outcome {
                Ok(model) => Outcome::Done { model },
                Err(fault) => Outcome::Failed {
                    error: fault.to_string(),
                },
            };
            job.ended_ms = now_ms();
            tracing::info!(
                job = job.number,
                seconds = started.elapsed().as_secs_f64(),
                outcome = ?job.outcome,
                "job ended"
            );
            if let Err(fault) = cloud.jobs.save(&job) {
                tracing::error!(job = job.number, %fault, "the end of a job can't be stored");
            }
            lock(&cloud.jobs.running).remove(&job.number);
        };
        if let Err(error) = std::thread::Builder::new()
            .name("job".to_owned())
            .spawn(body)
        {
            tracing::error!(%error, "a job can't be started; it runs when the server starts again");
        }
    }
}

fn run(
    cloud: &Cloud,
    work: &Work,
    progress: &mut dyn FnMut(u64, u64, String),
) -> Result<String, Fault> {
    let stations = Stations {
        store: &cloud.store,
        catalog: &cloud.catalog,
        labelling: &cloud.labelling,
        registry: &cloud.registry,
    };
    let model = match work {
        Work::Train(request) => {
            let (id, dataset) = cloud.catalog.find(&request.dataset)?;
            stations.train(
                &id,
                &dataset,
                &Run {
                    seed: request.seed.unwrap_or(0),
                    steps: request.steps,
                    scratch: request.scratch.unwrap_or(false),
                    head: request.head.unwrap_or(false),
                },
                progress,
            )?
        }
        Work::Eval(request) => stations.evaluate(
            &request.model,
            request.rare.as_deref().unwrap_or_default(),
            progress,
        )?,
    };
    Ok(model.id)
}
