//! Attacks with what was true once: old models, old offers, old time.

use super::{
    Bench, DAY_MS, FLOOR, ISSUED_MS, MANIFEST_ENDS_MS, NOW_MS, OFFER_ENDS_MS, ROOT_ENDS_MS,
    SEQUENCE, Sealed, SealedRoot, Surprise, judged, key, public,
};
use crate::trust::{Floor, Judge, Manifest, Offer, Role, Timekeeper, TrustError, TrustRoot};

/// Every kind of older release, and the confirmed one again.
pub fn attack_rollback(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    for sequence in [0, 1, 127, 128, FLOOR - 1, FLOOR] {
        let older = Manifest {
            sequence,
            ..world.manifest()
        };
        bench.refused(world.take(&older))?;
    }
    bench.believed(world.take(&world.manifest()))?;
    // The floor that the root sets counts as well, and only under the key that it is for.
    let mut floor = Floor::default();
    for sequence in [5, FLOOR, 4, SEQUENCE, 0] {
        floor.raise(world.trust.release_id(), sequence);
    }
    let raised = floor.under(world.trust.release_id(), 0);
    let sealed = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&sealed, SEQUENCE));
    for floor in [raised, floor.under(world.trust.rollout_id(), SEQUENCE)] {
        let judge = Judge {
            floor,
            ..world.judge()
        };
        bench.refused(judged(judge.offer(offer.signed(), sealed.signed())))?;
    }
    Ok(())
}

/// A stolen release key pushes the floor to the end of the numbers; a rotation brings it back.
pub fn attack_fast_forward_sequence(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let far = Manifest {
        sequence: u64::MAX,
        ..world.manifest()
    };
    bench.believed(world.take(&far))?;
    let mut floor = Floor::default();
    floor.raise(world.trust.release_id(), u64::MAX);
    let under = |trust: &TrustRoot| floor.under(trust.release_id(), trust.min_sequence);
    let stuck = Judge {
        floor: under(&world.trust),
        ..world.judge()
    };
    let sealed = world.released(&far);
    let offer = world.offered(&world.offer(&sealed, u64::MAX));
    bench.refused(judged(stuck.offer(offer.signed(), sealed.signed())))?;
    let good = world.released(&world.manifest());
    let good_offer = world.offered(&world.offer(&good, SEQUENCE));
    bench.refused(judged(stuck.offer(good_offer.signed(), good.signed())))?;

    let release = key(14);
    let next = TrustRoot {
        release: public(&release),
        min_sequence: FLOOR,
        ..world.next()
    };
    let by = [&world.root[0], &world.root[2]];
    let next = bench.believed(world.trust.update(SealedRoot::of(&next, &by).signed()))?;
    let free = Judge {
        trust: &next,
        floor: under(&next),
        ..world.judge()
    };
    // What the thief signed is worth nothing now, and the floor is where the root says.
    let thief = free.offer(offer.signed(), sealed.signed());
    bench.refused_as(TrustError::BadSignature, judged(thief))?;
    let rescue = Sealed::of(Role::Release, &release, &world.manifest());
    let offer = world.offered(&world.offer(&rescue, SEQUENCE));
    bench.believed(judged(free.offer(offer.signed(), rescue.signed())))?;
    let old = Manifest {
        sequence: FLOOR,
        ..world.manifest()
    };
    let old = Sealed::of(Role::Release, &release, &old);
    let offer = world.offered(&world.offer(&old, FLOOR));
    bench.refused(judged(free.offer(offer.signed(), old.signed())))
}

/// A stolen rollout key signs the end of time; a rotation brings the time back.
pub fn attack_fast_forward_time(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&manifest, SEQUENCE));
    let mut keeper = Timekeeper::default();
    let far = world.stamped(1, MANIFEST_ENDS_MS);
    bench.believed(keeper.answer(&world.trust, &world.device, 1, far.signed(), 0))?;
    let at = |keeper: &Timekeeper, trust| keeper.now(trust, Some(NOW_MS), 10);
    let judge = Judge {
        now_ms: at(&keeper, &world.trust),
        ..world.judge()
    };
    bench.refused(judged(judge.offer(offer.signed(), manifest.signed())))?;
    // It holds over a restart, and an honest answer does not turn it back.
    let mut keeper = Timekeeper::new(keeper.floor());
    let honest = world.stamped(2, NOW_MS);
    bench.believed(keeper.answer(&world.trust, &world.device, 2, honest.signed(), 0))?;
    let judge = Judge {
        now_ms: at(&keeper, &world.trust),
        ..world.judge()
    };
    bench.refused(judged(judge.offer(offer.signed(), manifest.signed())))?;

    let rollout = key(15);
    let next = TrustRoot {
        rollout: public(&rollout),
        issued_ms: NOW_MS - 1,
        ..world.next()
    };
    let by = [&world.root[0], &world.root[1]];
    let next = bench.believed(world.trust.update(SealedRoot::of(&next, &by).signed()))?;
    let judge = Judge {
        trust: &next,
        now_ms: at(&keeper, &next),
        ..world.judge()
    };
    let fresh = Sealed::of(Role::Rollout, &rollout, &world.offer(&manifest, SEQUENCE));
    bench.believed(judged(judge.offer(fresh.signed(), manifest.signed())))?;
    let thief = judge.offer(offer.signed(), manifest.signed());
    bench.refused_as(TrustError::BadSignature, judged(thief))
}

/// Offers and manifests a moment too late.
pub fn attack_freeze_expired(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&manifest, SEQUENCE));
    let lasting = world.offered(&Offer {
        expires_ms: u64::MAX,
        ..world.offer(&manifest, SEQUENCE)
    });
    for (offer, end_ms) in [(&offer, OFFER_ENDS_MS), (&lasting, MANIFEST_ENDS_MS)] {
        let at = |now_ms| {
            let judge = Judge {
                now_ms: Some(now_ms),
                ..world.judge()
            };
            judged(judge.offer(offer.signed(), manifest.signed()))
        };
        bench.believed(at(end_ms))?;
        bench.refused(at(end_ms + 1))?;
        bench.refused(at(end_ms + DAY_MS))?;
    }
    Ok(())
}

/// A device without a clock takes no offer before it has signed time of this start.
pub fn attack_freeze_without_clock(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&manifest, SEQUENCE));
    let take = |keeper: &Timekeeper, clock_ms, mono_ms| {
        let judge = Judge {
            now_ms: keeper.now(&world.trust, clock_ms, mono_ms),
            ..world.judge()
        };
        judged(judge.offer(offer.signed(), manifest.signed()))
    };
    let mut keeper = Timekeeper::default();
    bench.refused(take(&keeper, None, 0))?;
    // An offer that it heard raises the floor, and does not tell how late it is.
    keeper.heard(&world.trust, NOW_MS - 1000);
    bench.refused(take(&keeper, None, 0))?;
    // A clock that stands where nothing was signed yet was never set.
    bench.refused(take(&keeper, Some(ISSUED_MS - 1), 0))?;
    let stamp = world.stamped(3, NOW_MS);
    bench.believed(keeper.answer(&world.trust, &world.device, 3, stamp.signed(), 500))?;
    bench.believed(take(&keeper, None, 500))?;
    bench.believed(take(&keeper, None, 500 + 600_000))?;
    bench.refused_as(TrustError::Expired, take(&keeper, None, 501 + 600_000))?;
    // A restart takes the answer away, and not the floor.
    let keeper = Timekeeper::new(keeper.floor());
    bench.refused(take(&keeper, None, 0))
}

/// The clock is set back so that an old offer comes to life again.
pub fn attack_freeze_clock_set_back(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&world.manifest());
    let offer = world.offered(&world.offer(&manifest, SEQUENCE));
    let take = |keeper: &Timekeeper, clock_ms, mono_ms| {
        let judge = Judge {
            now_ms: keeper.now(&world.trust, Some(clock_ms), mono_ms),
            ..world.judge()
        };
        judged(judge.offer(offer.signed(), manifest.signed()))
    };
    let mut keeper = Timekeeper::default();
    bench.believed(take(&keeper, NOW_MS, 0))?;
    let later = world.stamped(4, OFFER_ENDS_MS + DAY_MS);
    bench.believed(keeper.answer(&world.trust, &world.device, 4, later.signed(), 0))?;
    for clock_ms in [NOW_MS, ISSUED_MS, 0] {
        bench.refused(take(&keeper, clock_ms, 10))?;
    }
    // After a restart the floor holds: such a clock is none.
    let keeper = Timekeeper::new(keeper.floor());
    for clock_ms in [NOW_MS, ISSUED_MS, 0, OFFER_ENDS_MS + DAY_MS - 1] {
        bench.refused_as(TrustError::NoTime, take(&keeper, clock_ms, 10))?;
    }
    bench.refused(take(&keeper, OFFER_ENDS_MS + DAY_MS, 10))
}

/// The answer to an earlier question, or to nobody's.
pub fn attack_freeze_replayed_time(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let mut keeper = Timekeeper::default();
    let old = world.stamped(7, ISSUED_MS);
    for nonce in [0, 6, 8, u64::MAX] {
        let answer = keeper.answer(&world.trust, &world.device, nonce, old.signed(), 0);
        bench.refused(answer)?;
    }
    // Nothing was learnt from it.
    if keeper != Timekeeper::default() {
        return Err(bench.surprise(None));
    }
    bench.believed(keeper.answer(&world.trust, &world.device, 7, old.signed(), 0))
}

/// A mirror holds newer trust roots back until the stored one has expired: no offer is taken then,
/// and a newer root still is.
pub fn attack_expired_stored_metadata(bench: &mut Bench<'_>) -> Result<(), Surprise> {
    let world = bench.world;
    let manifest = world.released(&Manifest {
        expires_ms: u64::MAX,
        ..world.manifest()
    });
    let offer = world.offered(&Offer {
        expires_ms: u64::MAX,
        ..world.offer(&manifest, SEQUENCE)
    });
    let take = |trust: &TrustRoot, now_ms| {
        let judge = Judge {
            trust,
            now_ms: Some(now_ms),
            ..world.judge()
        };
        judged(judge.offer(offer.signed(), manifest.signed()))
    };
    bench.believed(take(&world.trust, ROOT_ENDS_MS))?;
    bench.refused(take(&world.trust, ROOT_ENDS_MS + 1))?;
    // The next root has expired meanwhile, too; the one after it has not.
    let by = [&world.root[1], &world.root[2]];
    let next = bench.believed(
        world
            .trust
            .update(SealedRoot::of(&world.next(), &by).signed()),
    )?;
    bench.refused(take(&next, ROOT_ENDS_MS + 1))?;
    let newest = TrustRoot {
        version: next.version + 1,
        expires_ms: ROOT_ENDS_MS + DAY_MS,
        ..world.next()
    };
    let newest = bench.believed(next.update(SealedRoot::of(&newest, &by).signed()))?;
    bench.believed(take(&newest, ROOT_ENDS_MS + 1))
}
