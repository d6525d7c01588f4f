//! Calling agents: one lazily connected channel per agent, every call with a deadline.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use slotmesh_proto::agent::v1::{
    ExecuteStepRequest, ExecuteStepResponse, SetParametersRequest, SetParametersResponse,
    agent_service_client::AgentServiceClient,
};
use tonic::transport::{Channel, Endpoint};

use crate::trace;

/// For opening a connection to an agent.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// What an answer may take beyond the time that the step itself may take.
const ANSWER_MARGIN: Duration = Duration::from_millis(500);
/// Kept ones; beyond, all are opened anew.
const CHANNELS_MAX: usize = 1_024;
/// A dead connection is noticed within two of these.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Channels by address.
#[derive(Clone, Debug, Default)]
pub struct Agents {
    channels: Arc<Mutex<BTreeMap<String, Channel>>>,
}

impl Agents {
    /// Asks the agent at `address` to execute a step.
    ///
    /// # Errors
    /// When the address is malformed, the agent does not answer in time, or refuses the call.
    pub async fn execute(
        &self,
        address: &str,
        request: ExecuteStepRequest,
    ) -> Result<ExecuteStepResponse, tonic::Status> {
        let deadline = Duration::from_millis(request.timeout_ms.into()) + ANSWER_MARGIN;
        let channel = self.channel(address)?;
        let mut client = AgentServiceClient::new(channel);
        let parent = trace::parent(&request.trace_id);
        let mut request = tonic::Request::new(request);
        request.set_timeout(deadline);
        if let Some(Ok(parent)) = parent.map(|parent| parent.parse()) {
            request.metadata_mut().insert(trace::HEADER, parent);
        }
        match tokio::time::timeout(deadline, client.execute_step(request)).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(silent(address, deadline)),
        }
    }

    /// Asks the agent at `address` to set parameters of a node.
    ///
    /// # Errors
    /// As [`Agents::execute`].
    pub async fn set_parameters(
        &self,
        address: &str,
        request: SetParametersRequest,
    ) -> Result<SetParametersResponse, tonic::Status> {
        let deadline = Duration::from_millis(request.timeout_ms.into()) + ANSWER_MARGIN;
        let mut client = AgentServiceClient::new(self.channel(address)?);
        let mut request = tonic::Request::new(request);
        request.set_timeout(deadline);
        match tokio::time::timeout(deadline, client.set_parameters(request)).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(silent(address, deadline)),
        }
    }

    fn channel(&self, address: &str) -> Result<Channel, tonic::Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(channel) = channels.get(address) {
            return Ok(channel.clone());
        }
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| tonic::Status::internal(format!("agent address {address}: {e}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .tcp_nodelay(true)
            .connect_lazy();
        // An agent on a port of the system's choice has another address after each restart.
        if channels.len() >= CHANNELS_MAX {
            channels.clear();
        }
        channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }
}

fn silent(address: &str, deadline: Duration) -> tonic::Status {
    tonic::Status::deadline_exceeded(format!("agent at {address} did not answer in {deadline:?}"))
}
