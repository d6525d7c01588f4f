//! Whether a target whose engine is older than the old primary's has all that this one wrote.
//!
//! A replica that does not know a command refuses it and follows on, so that its offset says nothing;
//! only its own counter does. Invariant: it is asked after the fence, when nothing more can be written,
//! and after it has executed the last byte of the stream, so that nothing is refused unseen.

use std::time::Duration;

use slotmesh_proto::agent::v1::{HandOver as Order, TargetCheck};
use tokio::time::{Instant, sleep, timeout_at};

use super::{Event, Role};
use crate::{
    control::{Control, ControlError},
    handover::driver::chain,
    probe::Info,
};

/// Clients wait meanwhile: half of what the change itself may take, and far more than a target needs
/// whose lag was small enough to begin.
const LIMIT: Duration = Duration::from_millis(250);
/// Between two looks at a target that has not executed everything.
const PACE: Duration = Duration::from_millis(1);

/// What the target says of itself, as an event of the machine.
pub(super) async fn check(order: &Order, admin: &mut Control, deadline: Instant) -> Event {
    let Some(check) = &order.check else {
        return Event::TargetSound;
    };
    let written = match Info::read(admin, "replication").await {
        Ok(info) => info.offset(),
        Err(_) => {
            return Event::TargetUnsound("the old primary did not say how far it has written");
        }
    };
    let end = deadline.min(Instant::now() + LIMIT);
    let asked = timeout_at(end, ask(&order.target_address, check, written)).await;
    let event = match asked {
        Ok(Ok(event)) => event,
        Ok(Err(error)) => {
            tracing::warn!(error = %chain(&error), "target of hand-over not asked");
            Event::TargetUnsound("the target could not be asked whether it has everything")
        }
        Err(_) => Event::TargetUnsound("the target did not get to the end of the stream in time"),
    };
    if let Event::TargetUnsound(why) = event {
        tracing::warn!(target = %order.target_node_id, why, "hand-over given up before the change");
    }
    event
}

async fn ask(address: &str, check: &TargetCheck, written: u64) -> Result<Event, ControlError> {
    let mut control = Control::tcp(address, &check.user, &check.password).await?;
    loop {
        let info = Info::read(&mut control, "replication").await?;
        if info.role() == Some(Role::Replica) && info.offset() >= written {
            break;
        }
        sleep(PACE).await;
    }
    let stats = Info::read(&mut control, "stats").await?;
    let server = Info::read(&mut control, "server").await?;
    Ok(judge(&stats, &server, check))
}

fn judge(stats: &Info, server: &Info, check: &TargetCheck) -> Event {
    let refused: Option<u64> = stats.text("unexpected_error_replies").parse().ok();
    match refused {
        _ if server.run_id() != check.run_id => {
            Event::TargetUnsound("the target was restarted: it may lack some of the stream")
        }
        None => Event::TargetUnsound("the target does not count the commands that it refuses"),
        Some(refused) if refused > check.refused => Event::TargetUnsound(
            "the target refused a command of the newer engine: its data differs",
        ),
        Some(_) => Event::TargetSound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_has_everything_only_as_the_same_process_that_has_refused_nothing_more() {
        let check = TargetCheck {
            run_id: "one".into(),
            refused: 2,
            ..TargetCheck::default()
        };
        let judged = |run_id: &str, refused: &str| {
            let server = Info::parse(&format!("run_id:{run_id}"));
            let stats = Info::parse(&format!("unexpected_error_replies:{refused}"));
            judge(&stats, &server, &check)
        };
        assert_eq!(judged("one", "2"), Event::TargetSound);
        for (run_id, refused) in [("one", "3"), ("other", "2"), ("", "0"), ("one", "")] {
            assert!(
                matches!(judged(run_id, refused), Event::TargetUnsound(_)),
                "{run_id:?} {refused:?}"
            );
        }
    }
}
