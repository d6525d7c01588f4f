//! Calls to a controller's gRPC API.
//!
//! Any controller may be asked; one that does not lead says who does, and the call is repeated
//! there once. A call that changes something carries a client token, so repeating it is safe.

use std::{future::Future, time::Duration};

use slotmesh_proto::{
    fleet::v1::fleet_service_client::FleetServiceClient,
    instance::v1::{self as instance, instance_service_client::InstanceServiceClient},
    task::v1::{self as task, task_service_client::TaskServiceClient},
};
use tonic::{
    Response, Status,
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

/// The reason with which a controller says that another one leads.
const NOT_LEADER: &str = "NOT_LEADER";
/// The ErrorInfo field that holds the leader's address.
const LEADER_FIELD: &str = "leader";

/// A connection to one controller, and after a redirect to its leader.
#[derive(Debug, Clone)]
pub struct Api {
    address: String,
    channel: Channel,
}

impl Api {
    /// Connects to `host:port` (or `http://host:port`).
    ///
    /// # Errors
    /// [`Failure::Usage`] when the address can't be read, [`Failure::Unreachable`] when nobody answers.
    pub async fn connect(address: &str) -> Result<Self, Failure> {
        let uri = if address.contains("://") {
            address.to_owned()
        } else {
            format!("http://{address}")
        };
        let endpoint = Endpoint::from_shared(uri)
            .map_err(|_| {
                Failure::Usage(format!("controller address {address:?} is not HOST:PORT"))
            })?
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(CALL_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_while_idle(true);
        let channel = endpoint
            .connect()
            .await
            .map_err(|source| Failure::Unreachable {
                address: address.to_owned(),
                source,
            })?;
        Ok(Self {
            address: address.to_owned(),
            channel,
        })
    }

    /// The controller that calls go to.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Clients of the services, for calls that this type does not wrap.
    pub fn instances(&self) -> InstanceServiceClient<Channel> {
        InstanceServiceClient::new(self.channel.clone())
    }

    /// See [`Api::instances`].
    pub fn tasks(&self) -> TaskServiceClient<Channel> {
        TaskServiceClient::new(self.channel.clone())
    }

    /// See [`Api::instances`].
    pub fn fleet(&self) -> FleetServiceClient<Channel> {
        FleetServiceClient::new(self.channel.clone())
    }

    /// Makes a call, following a redirect to the leader once.
    ///
    /// # Errors
    /// As the controller answered.
    pub async fn call<T, F, Fut>(&mut self, rpc: F) -> Result<T, Failure>
    where
        F: Fn(Self) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        match rpc(self.clone()).await {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => {
                let Some(leader) = leader_of(&status) else {
                    return Err(Failure::from_status(&status));
                };
                *self = Self::connect(&leader).await?;
                let answer = rpc(self.clone()).await;
                answer
                    .map(Response::into_inner)
                    .map_err(|s| Failure::from_status(&s))
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
