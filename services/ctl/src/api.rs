//! Calls to a controller's gRPC API.
//!
//! Any controller may be asked; one that does not lead passes a call on, or says who leads. A patient
//! [`Api`] asks again, at another of its controllers, when a leader is lost on the way.
//!
//! Invariant: a call that changes something carries a client token, so that asking again is safe.

use std::{future::Future, time::Duration};

use slotmesh_proto::{
    artifact::v1::artifact_service_client::ArtifactServiceClient,
    fleet::v1::fleet_service_client::FleetServiceClient,
    instance::v1::{self as instance, instance_service_client::InstanceServiceClient},
    task::v1::{self as task, task_service_client::TaskServiceClient},
};
use slotmesh_runtime::backoff::Backoff;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{
    Code, Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt;

use crate::failure::Failure;

/// A controller on the same network answers in milliseconds; longer than this, it is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Admission is one store transaction; a leader election in between takes up to its lease.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// A stream may be silent for as long as its task is; the transport notices a dead peer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// For how long a call is made again: a leader's lease of 5 s and an election, nearly twice.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
/// See [`PAUSE_FIRST`].
const PAUSE_CAP: Duration = Duration::from_secs(1);

/// The reason with which a controller says that another one leads.
const NOT_LEADER: &str = "NOT_LEADER";
/// The ErrorInfo field that holds the leader's address.
const LEADER_FIELD: &str = "leader";

/// A connection that says which trace its calls belong to.
pub type Line = InterceptedService<Channel, Traced>;

/// Adds W3C's `traceparent` to calls.
#[derive(Debug, Clone, Default)]
pub struct Traced {
    parent: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Traced {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(parent) = &self.parent {
            request.metadata_mut().insert("traceparent", parent.clone());
        }
        Ok(request)
    }
}

/// A connection to one controller, and after a redirect to its leader.
#[derive(Debug, Clone)]
pub struct Api {
    address: String,
    channel: Channel,
    /// Those that may be asked.
    controllers: Vec<String>,
    patience: Duration,
    trace_id: String,
    traced: Traced,
}

impl Api {
    /// Connects to `host:port` (or `http://host:port`). What fails is not tried again.
    ///
    /// # Errors
    /// [`Failure::Usage`] when the address can't be read, [`Failure::Unreachable`] when nobody answers.
    pub async fn connect(address: &str) -> Result<Self, Failure> {
        Ok(Self {
            channel: open(address).await?,
            address: address.to_owned(),
            controllers: vec![address.to_owned()],
            patience: Duration::ZERO,
            trace_id: String::new(),
            traced: Traced::default(),
        })
    }

    /// Connects to the first of these controllers, separated by commas, that answers, for one command
    /// of an operator: all its calls are one trace, and those that a lost leader took along are made
    /// again, at another one too, for up to `patience`.
    ///
    /// # Errors
    /// As [`Api::connect`], of the last one.
    pub async fn patient(addresses: &str, patience: Duration) -> Result<Self, Failure> {
        let controllers: Vec<String> = addresses
            .split(',')
            .map(|address| address.trim().to_owned())
            .filter(|address| !address.is_empty())
            .collect();
        let mut failure = Failure::Usage("no controller is named".to_owned());
        for address in &controllers {
            match Self::connect(address).await {
                Ok(api) => {
                    return Ok(Self {
                        controllers,
                        patience,
                        ..api.in_new_trace()
                    });
                }
                Err(other) => failure = other,
            }
        }
        Err(failure)
    }

    fn in_new_trace(mut self) -> Self {
        self.trace_id = hex::encode(rand::random::<[u8; 16]>());
        let span = rand::random::<u64>().max(1);
        let parent = format!("00-{}-{span:016x}-01", self.trace_id);
        self.traced.parent = parent.parse().ok();
        self
    }

    /// The controller that calls go to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Of a command's calls, 32 hexadecimal digits; empty: each has one of the controller's making.
    pub fn trace_id(&self) -> &str {
        &self.trace_id
    }

    /// The operator's client token, or else a new one, so that the call can be made again.
    pub fn token(given: Option<String>) -> String {
        let given = given.filter(|token| !token.is_empty());
        given.unwrap_or_else(|| format!("ctl-{}", uuid::Uuid::now_v7().simple()))
    }

    fn line(&self) -> Line {
        InterceptedService::new(self.channel.clone(), self.traced.clone())
    }

    /// Clients of the services, for calls that this type does not wrap.
    pub fn instances(&self) -> InstanceServiceClient<Line> {
        InstanceServiceClient::new(self.line())
    }

    /// See [`Api::instances`].
    pub fn tasks(&self) -> TaskServiceClient<Line> {
        TaskServiceClient::new(self.line())
    }

    /// See [`Api::instances`].
    pub fn artifacts(&self) -> ArtifactServiceClient<Line> {
        ArtifactServiceClient::new(self.line())
    }

    /// See [`Api::instances`].
    pub fn fleet(&self) -> FleetServiceClient<Line> {
        FleetServiceClient::new(self.line())
    }

    /// Makes a call, following a redirect to the leader once; a patient one is made again for as long
    /// as it may yet be answered. It reads, or carries a client token.
    ///
    /// # Errors
    /// As the controller answered last.
    pub async fn call<T, F, Fut>(&mut self, rpc: F) -> Result<T, Failure>
    where
        F: Fn(Self) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let until = Instant::now() + self.patience;
        let mut pauses = Backoff::new(PAUSE_FIRST, PAUSE_CAP);
        let mut redirected = false;
        loop {
            let status = match rpc(self.clone()).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            if let Some(leader) = leader_of(&status).filter(|_| !redirected) {
                redirected = true;
                match self.turn_to(&leader).await {
                    Ok(()) => continue,
                    Err(failure) if self.patience.is_zero() => return Err(failure),
                    Err(_) => {}
                }
            }
            let pause = pauses.next_delay();
            if !may_be_answered(&status) || Instant::now() + pause >= until {
                return Err(Failure::from_status(&status));
            }
            tracing::debug!(
                controller = self.address,
                error = status.message(),
                "asking again"
            );
            sleep(pause).await;
            redirected = false;
            self.turn_to_another(until).await;
        }
    }

    async fn turn_to(&mut self, address: &str) -> Result<(), Failure> {
        self.channel = open(address).await?;
        address.clone_into(&mut self.address);
        Ok(())
    }

    /// The next one that answers; the same, when no other does.
    async fn turn_to_another(&mut self, until: Instant) {
        let known = self.controllers.clone();
        let position = known.iter().position(|known| *known == self.address);
        let after = position.map_or(0, |position| position + 1);
        let others = known.iter().cycle().skip(after).take(known.len());
        for address in others {
            // A call may go on with a connection that is not there now.
            if let Ok(Ok(())) = timeout_at(until, self.turn_to(address)).await {
                return;
            }
        }
    }

    /// Every instance, or those named.
    ///
    /// # Errors
    /// As the controller answered.
    pub async fn describe_instances(
        &mut self,
        ids: &[String],
    ) -> Result<Vec<instance::Instance>, Failure> {
        let request = instance::DescribeInstancesRequest {
            instance_ids: ids.to_vec(),
        };
        let answer = self
            .call(|api| {
                let request = request.clone();
                async move { api.instances().describe_instances(request).await }
            })
            .await?;
        Ok(answer.instances)
    }

    /// The shards of an instance, with their nodes.
    ///
    /// # Errors
    /// As the controller answered.
    pub async fn describe_shards(&mut self, id: &str) -> Result<Vec<instance::Shard>, Failure> {
        let request = instance::DescribeInstanceShardsRequest {
            instance_id: id.to_owned(),
        };
        let answer = self
            .call(|api| {
                let request = request.clone();
                async move { api.instances().describe_instance_shards(request).await }
            })
            .await?;
        Ok(answer.shards)
    }

    /// Admits a switchover and returns its task's id.
    ///
    /// # Errors
    /// As the controller answered.
    pub async fn switch_over(
        &mut self,
        request: instance::SwitchOverRequest,
    ) -> Result<String, Failure> {
        let answer = self
            .call(|api| {
                let request = request.clone();
                async move { api.instances().switch_over(request).await }
            })
            .await?;
        Ok(answer.task_id)
    }

    /// Where a task stands.
    ///
    /// # Errors
    /// As the controller answered.
    pub async fn task(&mut self, task_id: &str) -> Result<task::Task, Failure> {
        let request = task::GetTaskRequest {
            task_id: task_id.to_owned(),
        };
        let answer = self
            .call(|api| {
                let request = request.clone();
                async move { api.tasks().get_task(request).await }
            })
            .await?;
        answer.task.ok_or_else(|| {
            Failure::from_status(&Status::internal("the controller answered without a task"))
        })
    }
}

async fn open(address: &str) -> Result<Channel, Failure> {
    let uri = if address.contains("://") {
        address.to_owned()
    } else {
        format!("http://{address}")
    };
    let endpoint = Endpoint::from_shared(uri)
        .map_err(|_| Failure::Usage(format!("controller address {address:?} is not HOST:PORT")))?
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_while_idle(true);
    let connected = endpoint.connect().await;
    connected.map_err(|source| Failure::Unreachable {
        address: address.to_owned(),
        source,
    })
}

/// Nobody leads, the leader was lost with the call, or the connection broke: another may answer.
fn may_be_answered(status: &Status) -> bool {
    let broke = || {
        let source = std::error::Error::source(status);
        source.is_some_and(|source| source.is::<tonic::transport::Error>())
    };
    status.code() == Code::Unavailable || broke()
}

fn leader_of(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    if info.reason != NOT_LEADER {
        return None;
    }
    info.metadata
        .get(LEADER_FIELD)
        .filter(|address| !address.is_empty())
        .cloned()
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn only_a_redirect_that_names_the_leader_is_followed() {
        let with = |reason: &str, address: &str| {
            let metadata = [(LEADER_FIELD.to_owned(), address.to_owned())];
            let details = ErrorDetails::with_error_info(reason, "slotmesh", metadata);
            leader_of(&Status::with_error_details(
                Code::FailedPrecondition,
                "",
                details,
            ))
        };
        assert_eq!(
            with(NOT_LEADER, "127.0.0.1:7"),
            Some("127.0.0.1:7".to_owned())
        );
        assert_eq!(with(NOT_LEADER, ""), None);
        assert_eq!(with("SHARD_BUSY", "127.0.0.1:7"), None);
    }
}
