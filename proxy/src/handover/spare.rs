//! The process that has given everything away: how it stands by, and how it is made to serve again.
//!
//! Invariant: while another process serves, exactly one thread here looks after that: the giver's as
//! long as the two talk, and [`stand_by`] after that, however the conversation ended and whatever came
//! of a way back. So a spare serves again when the other dies, and ends when it is not needed.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::giver::{DRAIN_LIMIT, LOOK_AGAIN, SPARE_TIME};
use super::leaving::TRAVEL_LIMIT;
use super::prepare::get_ready;
use super::taker::{LOOK_INTERVAL, take_over};
use super::wire::Wire;
use super::{Office, PROXY_JSON, Role, door};

/// For the spare to end its own conversation before it takes back.
const BACK_LIMIT: Duration = Duration::from_secs(5);
/// For the way back as a whole, with the trial.
const TAKEN_LIMIT: Duration = Duration::from_secs(30);

/// The other process talks no more: it comes again, or it ends, or this one does.
pub(super) fn stand_by(office: &Office, wire: &Wire, talks: u64) {
    wire.hang_up();
    let mut later: Option<Wire> = None;
    let began = Instant::now();
    let mut alone: Option<Instant> = None;
    let same = || {
        let last = office.talks.load(Ordering::Relaxed) == talks;
        last && office.role() == Role::Relieved && !office.stop.is_cancelled()
    };
    while same() {
        if later.as_ref().unwrap_or(wire).peer_ends(LOOK_AGAIN) {
            // It may have been relieved in turn, and have ended as it should.
            later = who_serves(office);
            if later.is_none() {
                tracing::warn!("the process that had taken over is gone; this one serves again");
                office.serve(None);
                return office.insist();
            }
        }
        let left = office.clients();
        office.counts.left.store(left as u64, Ordering::Relaxed);
        if left > 0 && began.elapsed() >= TRAVEL_LIMIT {
            office.send_rest(DRAIN_LIMIT.saturating_sub(began.elapsed()));
        }
        alone = (left == 0).then(|| alone.unwrap_or_else(Instant::now));
        let done = alone.is_some_and(|since| since.elapsed() >= SPARE_TIME);
        if done || began.elapsed() >= DRAIN_LIMIT {
            tracing::info!(left, "is not needed any more and ends");
            return office.stop.cancel();
        }
    }
}

/// The process that proxy.json names, if that is another one and lives.
fn who_serves(office: &Office) -> Option<Wire> {
    let stream = door::connect(&serving_door(office)?).ok()?;
    Wire::new(stream).ok()
}

/// Where the process is asked that proxy.json names, if that is another one.
fn serving_door(office: &Office) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Serving {
        handover: PathBuf,
    }
    let text = std::fs::read(office.data.join(PROXY_JSON)).ok()?;
    let serving: Serving = serde_json::from_slice(&text).ok()?;
    (serving.handover != office.door).then_some(serving.handover)
}

/// Makes this process, a spare, serve again: the same hand-over backwards. Returns when everybody has
/// come who can.
///
/// # Errors
/// Why the other process goes on to serve, for the operator. This one is a spare as before.
pub(super) fn take_back(office: &Arc<Office>) -> Result<(), String> {
    if office.role() != Role::Relieved {
        return Err("this process is no spare".to_owned());
    }
    let successor = office
        .successor
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let path = serving_door(office).or(successor);
    let path = path.ok_or("nobody has relieved this process")?;
    office.wants_back.store(true, Ordering::Relaxed);
    let until = Instant::now() + BACK_LIMIT;
    // The conversation in which it gives must end first.
    while office.turn.try_lock().is_err() {
        if Instant::now() >= until {
            office.wants_back.store(false, Ordering::Relaxed);
            return Err("the hand-over before did not end in time".to_owned());
        }
        std::thread::park_timeout(LOOK_INTERVAL);
    }
    let (told, settled) = channel();
    let taking = Arc::clone(office);
    office.runtime.spawn_blocking(move || {
        let tell = told.clone();
        let first = move || {
            let _ = tell.send(Ok(())); // only the first is waited for
        };
        taking.report.begin();
        let ready = get_ready(&taking, &path);
        let ended = ready.and_then(|()| take_over(&taking, &path, &first));
        if let Err(error) = &ended {
            taking.report.failed(error);
            tracing::warn!(%error, "the spare does not serve again");
        }
        let _ = told.send(ended.map_err(|error| error.to_string()));
        taking.insist();
    });
    let ended = settled.recv_timeout(TAKEN_LIMIT);
    ended.unwrap_or_else(|_| Err("the hand-over takes too long; look at the log".to_owned()))
}
