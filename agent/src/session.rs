//! The stream to a controller: registers, reports, takes assignments; comes back after every break.
//!
//! Invariant: an assignment of a lower term, or of a lower revision than one already taken, is never
//! passed on; and losing all controllers changes nothing on this host.

use std::{sync::Arc, time::Duration};

use slotmesh_proto::agent::v1::{
    Assignment, HostReport, Register, SessionRequest, control_service_client::ControlServiceClient,
    session_request, session_response,
};
use slotmesh_runtime::backoff::Backoff;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{host::Host, journal::record::Fact};

/// Also keeps the host's lease: each report may renew a right that lasts for 2.2 s.
const REPORT_EVERY: Duration = Duration::from_millis(250);
/// Between reports of changes: a burst becomes one report, and the first of it waits for nothing.
const REPORT_SPACING: Duration = Duration::from_millis(3);
/// Reports that a controller has not taken yet. More than two mean that it is stuck.
const UNSENT_MAX: usize = 2;
/// Of hundreds of nodes with all the parameters that a request may carry.
const ASSIGNMENT_BYTES_MAX: usize = 128 << 20;
const SEND_TIMEOUT: Duration = Duration::from_secs(2);
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);

/// The newest assignment.
pub type Assignments = watch::Sender<Option<Arc<Assignment>>>;

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("dial controller")]
    Dial(#[from] tonic::transport::Error),
    #[error("session refused or broken: {0}")]
    Broken(String),
    #[error("controller does not answer")]
    Silent,
    #[error("controller ended the session")]
    Ended,
    #[error("controller does not keep this host's lease")]
    NoLease,
    #[error("journal")]
    Journal(#[from] crate::journal::JournalError),
}

/// Keeps a session until `stop`.
pub async fn run(
    host: Arc<Host>,
    register: Register,
    assignments: Assignments,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
    let mut turn = 0usize;
    loop {
        let addresses = host.controllers.addresses();
        let Some(address) = addresses.get(turn % addresses.len().max(1)) else {
            return;
        };
        let since = Instant::now();
        let session = one_session(&host, address, &register, &assignments);
        let end = tokio::select! {
            () = stop.cancelled() => return,
            end = Box::pin(session) => end,
        };
        host.controllers.prefer(None);
        let error = match end {
            Ok(never) => match never {},
            Err(error) => error,
        };
        tracing::warn!(controller = %address, error = %crate::handover::driver::chain(&error), "no session");
        if since.elapsed() > OPEN_TIMEOUT {
            backoff.reset();
        }
        turn += 1;
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(backoff.next_delay()) => {}
        }
    }
}

async fn one_session(
    host: &Host,
    address: &str,
    register: &Register,
    assignments: &Assignments,
) -> Result<std::convert::Infallible, SessionError> {
    let mut client = ControlServiceClient::new(host.controllers.channel(address)?)
        .max_decoding_message_size(ASSIGNMENT_BYTES_MAX);
    let (sender, receiver) = mpsc::channel(UNSENT_MAX);
    host.lease.begin_session();
    let mut changed = host.reports.subscribe();
    // Before the call: some servers answer a stream only after its first message.
    send(
        &sender,
        session_request::Message::Register(Register {
            opened_unix_us: unix_us(),
            ..register.clone()
        }),
    )
    .await?;
    let mut reported = *changed.borrow_and_update();
    send(&sender, report(host)).await?;
    let opened = timeout(OPEN_TIMEOUT, client.session(ReceiverStream::new(receiver))).await;
    let mut inbound = opened
        .map_err(|_| SessionError::Silent)?
        .map_err(|status| SessionError::Broken(status.message().to_owned()))?
        .into_inner();
    host.controllers.prefer(Some(address.to_owned()));
    tracing::info!(controller = address, "session open");
    let mut tick = interval(REPORT_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut not_before = Instant::now();
    loop {
        tokio::select! {
            message = inbound.message() => {
                let message = message
                    .map_err(|status| SessionError::Broken(status.message().to_owned()))?
                    .ok_or(SessionError::Ended)?;
                match message.message {
                    Some(session_response::Message::Assignment(assignment)) => {
                        take(host, assignment, assignments).await?;
                    }
                    Some(session_response::Message::LeaseKept(kept)) => host.lease.kept(&kept),
                    None => {}
                }
                continue;
            }
            _ = tick.tick() => {
                // It may be cut off from the store; another one may not be.
                if host.lease.is_unheard() && host.controllers.addresses().len() > 1 {
                    return Err(SessionError::NoLease);
                }
            }
            () = changed_spaced(&mut changed, reported, not_before) => {}
        }
        reported = *changed.borrow_and_update();
        send(&sender, report(host)).await?;
        not_before = Instant::now() + REPORT_SPACING;
    }
}

/// Everything, with the number by which it is answered; its time counts from here.
fn report(host: &Host) -> session_request::Message {
    let number = host.lease.reporting();
    session_request::Message::Report(HostReport {
        number,
        ..host.reports.all()
    })
}

/// Waits for a report that differs from the one sent, and for its turn.
///
/// # Cancel safety
/// Safe: it looks at a number, not at a notice.
async fn changed_spaced(changed: &mut watch::Receiver<u64>, reported: u64, not_before: Instant) {
    let gone = changed
        .wait_for(|version| *version != reported)
        .await
        .is_err();
    if gone {
        // The host is shutting down.
        std::future::pending::<()>().await;
    }
    tokio::time::sleep_until(not_before).await;
}

/// Orders the sessions of one agent, whichever controllers they are with.
fn unix_us() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_micros()).unwrap_or(u64::MAX))
}

async fn send(
    sender: &mpsc::Sender<SessionRequest>,
    message: session_request::Message,
) -> Result<(), SessionError> {
    let request = SessionRequest {
        message: Some(message),
    };
    match timeout(SEND_TIMEOUT, sender.send(request)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(SessionError::Ended),
        Err(_) => Err(SessionError::Silent),
    }
}

async fn take(
    host: &Host,
    assignment: Assignment,
    assignments: &Assignments,
) -> Result<(), SessionError> {
    let term = host.journal.read(|memory| memory.term());
    let taken = assignments.borrow().as_ref().map_or(0, |a| a.revision);
    if assignment.term < term || assignment.revision < taken {
        // Once in a while from a controller that lags behind. If it does not end, this mesh's store
        // was replaced, and this host must be added to it anew.
        tracing::warn!(
            term = assignment.term,
            revision = assignment.revision,
            journaled_term = term,
            taken_revision = taken,
            "older assignment left out"
        );
        return Ok(());
    }
    host.journal.append([Fact::Term(assignment.term)]).await?;
    host.controllers.learn(&assignment.controller_addresses);
    assignments.send_replace(Some(Arc::new(assignment)));
    Ok(())
}
