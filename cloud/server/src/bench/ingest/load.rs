//! Devices that do nothing but send.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use device_core::uplink::Transport;
use flywheel_agent::identity::Identity;
use flywheel_agent::transport::{self, Connection};
use flywheel_agent::wire;
use flywheel_shared::message::{Batch, Codec, Down, Hello, Lane, Record, Sample, Scores, Up};
use flywheel_shared::trust::{self, Role};
use flywheel_shared::{MAX_MESSAGE, WIRE_VERSION, envelope};
use tokio::task::JoinSet;

use super::Percentiles;

/// Bytes of a batch, as in the agent.
const BATCH: usize = 256 * 1024;
/// Batches on the way, as in the agent.
const WINDOW: usize = 4;

/// What to send.
#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) transport: Transport,
    /// Bytes of a picture.
    pub(super) size: usize,
    /// A fresh one, so that numbers begin at 1.
    pub(super) epoch: u32,
    pub(super) length: Duration,
}

/// What became of it.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) samples: u64,
    pub(super) seconds: f64,
    /// Milliseconds of each batch.
    acks: Vec<f64>,
}

impl Tally {
    pub(super) fn percentiles(&self) -> Percentiles {
        let mut sorted = self.acks.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let index = (share * sorted.len() as f64) as usize;
            sorted
                .get(index.min(sorted.len().saturating_sub(1)))
                .copied()
                .unwrap_or(0.0)
        };
        Percentiles {
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
        }
    }
}

/// All devices at once, until the time is over and everything sent is acknowledged.
pub(super) async fn run(identities: &[Arc<Identity>], load: &Load) -> Result<Tally> {
    // Connections first, so that handshakes are not measured.
    let mut connections = Vec::new();
    for identity in identities {
        connections.push(open(identity, load).await?);
    }
    let started = Instant::now();
    let deadline = started + load.length;
    let mut drives = JoinSet::new();
    for (connection, identity) in connections.into_iter().zip(identities) {
        drives.spawn(drive(connection, identity.clone(), *load, deadline));
    }
    let mut total = Tally::default();
    while let Some(tally) = drives.join_next().await {
        let tally = tally??;
        total.samples += tally.samples;
        total.acks.extend(tally.acks);
    }
    total.seconds = started.elapsed().as_secs_f64();
    Ok(total)
}

async fn open(identity: &Identity, load: &Load) -> Result<Connection> {
    let mut connection = transport::connect(load.transport, identity).await?;
    let hello = Up::Hello(Hello {
        device: identity.device.clone(),
        wire_version: WIRE_VERSION,
        epoch: load.epoch,
    });
    if connection.send(wire::envelope(&hello)).await.is_err() {
        bail!("the connection ended: {}", connection.why());
    }
    loop {
        let bytes = connection.recv().await;
        let bytes = bytes.with_context(|| format!("no welcome: {}", connection.why()))?;
        if matches!(decode(&bytes)?, Down::Welcome(_)) {
            return Ok(connection);
        }
    }
}

async fn drive(
    mut connection: Connection,
    identity: Arc<Identity>,
    load: Load,
    deadline: Instant,
) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut picture = vec![0; load.size];
    getrandom::fill(&mut picture).map_err(|error| anyhow::anyhow!("no randomness: {error}"))?;
    let per_batch = (BATCH / load.size).clamp(1, 256) as u32;
    let mut next = 1;
    let mut flight: VecDeque<(u32, Instant)> = VecDeque::new();
    loop {
        while flight.len() < WINDOW && Instant::now() < deadline {
            let batch = batch(&identity, &load, next, per_batch, &mut picture);
            next += per_batch;
            flight.push_back((next - 1, Instant::now()));
            if connection.send(batch).await.is_err() {
                bail!("the connection ended: {}", connection.why());
            }
        }
        if flight.is_empty() {
            connection.close().await;
            return Ok(tally);
        }
        let bytes = connection.recv().await;
        let bytes = bytes.with_context(|| format!("the connection ended: {}", connection.why()))?;
        match decode(&bytes)? {
            Down::Ack(ack) if ack.epoch == load.epoch => {
                let reached = ack.ranges.iter().map(|range| range.1).max().unwrap_or(0);
                while let Some((_, sent)) = flight.pop_front_if(|(last, _)| *last <= reached) {
                    tally.acks.push(sent.elapsed().as_secs_f64() * 1e3);
                    tally.samples += u64::from(per_batch);
                }
            }
            Down::Refused(refused) => bail!("the server refused a batch: {refused:?}"),
            _ => {}
        }
    }
}

/// A signed batch in its envelope.
fn batch(identity: &Identity, load: &Load, first: u32, count: u32, picture: &mut [u8]) -> Vec<u8> {
    let mut records = Vec::with_capacity(count as usize * (picture.len() + 128));
    for seq in first..first + count {
        // Pictures differ, or the store would keep one.
        let number = u64::from(load.epoch) << 32 | u64::from(seq);
        picture[..8].copy_from_slice(&number.to_le_bytes());
        wire::append(
            &Record::Sample(Sample {
                seq,
                frame: u64::from(seq),
                captured_ms: 0,
                track: u64::from(seq),
                model: [0; 8],
                lane: Lane::Uniform,
                inclusion: 1.0,
                scores: Scores::default(),
                embedding_scale: 0.0,
                embedding: &[],
                width: 1024,
                height: (picture.len() / 1024) as u16,
                codec: Codec::Gray8,
                payload: picture,
            }),
            &mut records,
        );
    }
    let count = count as u16;
    let digest = trust::batch_digest(&identity.device, load.epoch, count, &records);
    wire::envelope(&Up::Batch(Batch {
        epoch: load.epoch,
        count,
        records: &records,
        signature: &trust::sign_digest(Role::Device, &identity.key, &digest),
    }))
}

fn decode(bytes: &[u8]) -> Result<Down<'_>> {
    let (payload, _) = envelope::split(bytes, MAX_MESSAGE)
        .map_err(|error| anyhow::anyhow!("the server sent no envelope: {error:?}"))?;
    postcard::from_bytes(payload).context("the server sent no message")
}
