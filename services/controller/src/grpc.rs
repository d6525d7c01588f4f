//! The controller's gRPC services, one file a service; and the one place where a refusal becomes a
//! `Status`.

pub mod agent;
pub mod artifact;
pub mod fleet;
pub mod instance;
pub mod peer;
pub mod task;
pub(crate) mod token;
pub mod topology;

use std::{collections::HashMap, pin::Pin, sync::Arc};

use slotmesh_proto::agent::v1::Register;
use slotmesh_task::admit::{Refusal, RefusalKind};
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    agents::Agents,
    forward::Leaders,
    hub::Hub,
    jumps::Jumps,
    leader::{Leadership, Term},
    mirror::{Mirror, State},
    peers,
    store::{Store, StoreError},
};

/// Domain of every ErrorInfo of ours.
pub const ERROR_DOMAIN: &str = "slotmesh";

/// A server-side stream of messages.
pub(crate) type MessageStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What every service needs.
#[derive(Clone, Debug)]
pub struct Context {
    /// The one truth.
    pub store: Arc<dyn Store>,
    /// A copy of it.
    pub mirror: Mirror,
    /// What is observed.
    pub hub: Hub,
    /// Who leads.
    pub leadership: watch::Receiver<Leadership>,
    /// Calls to agents.
    pub agents: Agents,
    /// This controller's name among its peers.
    pub controller_id: String,
    /// This controller, as others reach it.
    pub address: String,
    /// False while the store does not answer: then streams end, so that their peers go elsewhere.
    pub in_reach: watch::Receiver<bool>,
    /// Connections to other controllers.
    pub leaders: Leaders,
    /// Instances that are given patches by themselves at a time.
    pub auto_upgrades: usize,
    /// Of this process's clock.
    pub jumps: Jumps,
    /// The process is stopping: streams end, so that their peers go elsewhere at once.
    pub stopping: CancellationToken,
}

impl Context {
    /// The term, when this controller leads; else a refusal that names the leader.
    ///
    /// # Errors
    /// When another controller leads, or none does.
    #[allow(clippy::result_large_err)] // tonic's Status is what every handler returns.
    pub fn leading(&self) -> Result<Term, Status> {
        match &*self.leadership.borrow() {
            Leadership::Leading { term } => Ok(*term),
            Leadership::Following { leader, .. } => {
                Err(not_leader(leader.as_ref().map(|l| l.address.as_str())))
            }
        }
    }

    /// Whether streams may be served here: leader or not, while what they would say is fresh.
    ///
    /// # Errors
    /// When the store has not answered for a while.
    #[allow(clippy::result_large_err)]
    pub fn serving(&self) -> Result<(), Status> {
        if *self.in_reach.borrow() {
            return Ok(());
        }
        Err(refuse(
            RefusalKind::Unavailable,
            "STORE_UNAVAILABLE",
            "this controller does not reach the store; ask another one",
        ))
    }

    /// All controllers, as agents and proxies are told them.
    pub(crate) fn controller_addresses(&self, state: &State) -> Vec<String> {
        peers::addresses(state, &self.address)
    }

    /// Address of another agent that has a session as the same host, here or anywhere. The leader
    /// knows them all; without one, this controller's own sessions decide.
    pub(crate) async fn other_agent(&self, register: &Register) -> Option<String> {
        if let Some(address) = self.hub.other_agent(register) {
            return Some(address);
        }
        let leader = self.leadership.borrow().leader().cloned()?;
        self.leaders.other_agent(&leader.address, register).await
    }
}

/// Set on the refusal, so that whoever forwarded a call knows that nothing was done.
pub(crate) const NOT_LEADER_HEADER: &str = "slotmesh-not-leader";

/// Another controller leads: ask there.
pub(crate) fn not_leader(leader: Option<&str>) -> Status {
    let metadata: HashMap<_, _> = leader
        .map(|l| ("leader".to_owned(), l.to_owned()))
        .into_iter()
        .collect();
    let message = match leader {
        Some(leader) => format!("this controller does not lead; ask {leader}"),
        None => "no controller leads now; try again in a few seconds".to_owned(),
    };
    let details = ErrorDetails::with_error_info("NOT_LEADER", ERROR_DOMAIN, metadata);
    let mut status = Status::with_error_details(Code::Unavailable, message, details);
    let metadata = status.metadata_mut();
    metadata.insert(NOT_LEADER_HEADER, MetadataValue::from_static("1"));
    status
}

/// A refusal of ours, with its reason for programs.
pub(crate) fn refused(refusal: &Refusal) -> Status {
    let code = match refusal.kind {
        RefusalKind::Invalid => Code::InvalidArgument,
        RefusalKind::NotFound => Code::NotFound,
        RefusalKind::Precondition => Code::FailedPrecondition,
        RefusalKind::Conflict => Code::Aborted,
        RefusalKind::AlreadyExists => Code::AlreadyExists,
        RefusalKind::Unavailable => Code::Unavailable,
    };
    let details = ErrorDetails::with_error_info(refusal.reason, ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(code, refusal.message.clone(), details)
}

/// A refusal made on the spot.
pub(crate) fn refuse(
    kind: RefusalKind,
    reason: &'static str,
    message: impl Into<String>,
) -> Status {
    refused(&Refusal {
        kind,
        reason,
        message: message.into(),
    })
}

/// The store did not do as asked.
pub(crate) fn store_failed(error: &StoreError) -> Status {
    let (code, reason) = match error {
        StoreError::Unavailable { .. } | StoreError::Compacted { .. } => {
            (Code::Unavailable, "STORE_UNAVAILABLE")
        }
        _ => (Code::Internal, "STORE_FAILED"),
    };
    let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(code, error.to_string(), details)
}
