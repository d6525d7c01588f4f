//! AgentService: the door through which a leader's steps come in.
//!
//! Invariant: a step of a lower term or epoch than the journal's is refused before anything else is
//! looked at, and a step that has an outcome gets that outcome again.

use std::{sync::Arc, time::Duration};

use slotmesh_proto::agent::v1::{
    ExecuteStepRequest, ExecuteStepResponse, PromiseNotToPromoteRequest,
    PromiseNotToPromoteResponse, ReadLostWritesRequest, ReadLostWritesResponse,
    SetParametersRequest, SetParametersResponse, StageEngine, StepOutcome,
    agent_service_server::AgentService, execute_step_request::Act,
};
use tokio::{sync::oneshot, time::timeout};
use tonic::{Request, Response, Status};

use crate::{
    capture::serve as capture,
    handover::driver::chain,
    host::{Host, is_id},
    journal::{
        Journal,
        record::{Fact, Memory, ShardEpoch, StepKey},
    },
    node::trial::Trials,
    node::worker::{NodeCall, ParametersCall, StepCall},
    supervisor::Supervisor,
};

/// A client waits for them; a node that is busy for longer is asked by nobody any more.
const PARAMETERS_TIME_MAX: Duration = Duration::from_secs(5);

/// Serves the steps of one host.
#[derive(Debug)]
pub struct Executor {
    host: Arc<Host>,
    supervisor: Arc<Supervisor>,
    trials: Trials,
}

impl Executor {
    pub fn new(host: Arc<Host>, supervisor: Arc<Supervisor>) -> Self {
        let trials = Trials::new(&host.nodes_dir);
        Self {
            host,
            supervisor,
            trials,
        }
    }

    async fn execute(&self, request: ExecuteStepRequest) -> Result<ExecuteStepResponse, Status> {
        let node_id = node_of(&request)?.to_owned();
        tracing::info!(
            task = request.task_id,
            step = request.step,
            trace_id = request.trace_id,
            "step asked for"
        );
        self.host.metrics.steps.add(1);
        if let Some(Act::StageEngine(order)) = &request.act {
            return Ok(self.stage(&request, order));
        }
        if let Some(answer) = settled(&self.host.journal, &request) {
            self.host.metrics.steps_settled.add(1);
            return Ok(answer);
        }
        let facts = [
            Fact::Term(request.term),
            Fact::Epoch(ShardEpoch {
                instance_id: request.instance_id.clone(),
                shard_id: request.shard_id.clone(),
                epoch: request.epoch,
            }),
        ];
        if let Err(error) = self.host.journal.append(facts).await {
            tracing::error!(error = %chain(&error), "step not journaled, not executed");
            return Ok(not_executed(&self.host.journal, &request, &chain(&error)));
        }
        let Some(calls) = self.supervisor.calls_of(&node_id) else {
            let why = "the node is not on this host";
            return Ok(not_executed(&self.host.journal, &request, why));
        };
        let (answer, answered) = oneshot::channel();
        let call = NodeCall::Step(Box::new(StepCall { request, answer }));
        if calls.try_send(call).is_err() {
            return Err(Status::resource_exhausted(
                "too many steps wait for this node",
            ));
        }
        // The worker bounds each step; a step goes on when the caller hangs up, and the outcome is
        // kept for whoever asks again.
        answered
            .await
            .map_err(|_| Status::unavailable("the agent is shutting down"))
    }
}

impl Executor {
    /// Beside the node and of no matter to any epoch, so it neither waits for the node's worker nor is
    /// it journaled.
    fn stage(&self, request: &ExecuteStepRequest, order: &StageEngine) -> ExecuteStepResponse {
        let term = self.host.journal.read(Memory::term);
        let mut answer = match request.term < term {
            true => response(StepOutcome::Fenced, "a higher term is known here"),
            false => self.trials.ask(&self.host, request, order),
        };
        answer.known_term = term;
        answer
    }

    /// Not journaled: what nobody stores is undone by the worker, or ends with the process.
    async fn set(&self, request: SetParametersRequest) -> Result<SetParametersResponse, Status> {
        if !is_id(&request.node_id) {
            return Err(Status::invalid_argument("node_id: not an id"));
        }
        let term = self.host.journal.read(Memory::term);
        if request.term < term {
            return Err(Status::failed_precondition("a higher term is known here"));
        }
        let Some(calls) = self.supervisor.calls_of(&request.node_id) else {
            return Ok(SetParametersResponse::default());
        };
        let limit = Duration::from_millis(request.timeout_ms.into()).min(PARAMETERS_TIME_MAX);
        let (answer, answered) = oneshot::channel();
        let call = NodeCall::SetParameters(ParametersCall { request, answer });
        if calls.try_send(call).is_err() {
            return Err(Status::resource_exhausted(
                "too many calls wait for this node",
            ));
        }
        match timeout(limit, answered).await {
            Ok(answer) => answer.map_err(|_| Status::unavailable("the agent is shutting down")),
            Err(_) => Err(Status::deadline_exceeded("the node is busy")),
        }
    }
}

#[tonic::async_trait]
impl AgentService for Executor {
    async fn execute_step(
        &self,
        request: Request<ExecuteStepRequest>,
    ) -> Result<Response<ExecuteStepResponse>, Status> {
        self.execute(request.into_inner()).await.map(Response::new)
    }

    async fn promise_not_to_promote(
        &self,
        request: Request<PromiseNotToPromoteRequest>,
    ) -> Result<Response<PromiseNotToPromoteResponse>, Status> {
        let (lease, journal) = (&self.host.lease, &self.host.journal);
        Ok(Response::new(lease.promise(request.get_ref(), journal)))
    }

    type ReadLostWritesStream =
        tokio_stream::wrappers::ReceiverStream<Result<ReadLostWritesResponse, Status>>;

    async fn read_lost_writes(
        &self,
        request: Request<ReadLostWritesRequest>,
    ) -> Result<Response<Self::ReadLostWritesStream>, Status> {
        let name = request.into_inner().file;
        let stream = capture::read(&self.host.lost_dir, &name).await?;
        Ok(Response::new(stream))
    }

    async fn set_parameters(
        &self,
        request: Request<SetParametersRequest>,
    ) -> Result<Response<SetParametersResponse>, Status> {
        let answer = self.set(request.into_inner()).await;
        answer.map(Response::new)
    }
}

/// The answer that the journal gives: an outcome of before, or the refusal of a step from the past.
pub fn settled(journal: &Journal, request: &ExecuteStepRequest) -> Option<ExecuteStepResponse> {
    journal.read(|memory| settled_by(memory, request))
}

/// The pure half of [`settled`].
pub fn settled_by(memory: &Memory, request: &ExecuteStepRequest) -> Option<ExecuteStepResponse> {
    let term = memory.term();
    let epoch = memory.epoch(&request.instance_id, &request.shard_id);
    let outcome = memory.outcome(&StepKey::of(request)).cloned();
    // Epochs rise by the very steps whose outcome is asked for again, so only the term counts there.
    let mut answer = match outcome {
        Some(outcome) if request.term >= term => outcome,
        _ if request.term < term || request.epoch < epoch => {
            response(StepOutcome::Fenced, "a higher term or epoch is known here")
        }
        _ => return None,
    };
    answer.known_term = term;
    answer.known_epoch = epoch;
    Some(answer)
}

/// The answer to a step that can't be executed now. It has no effect only if it had not begun
/// before: the leader gives the shard back on that word.
pub fn not_executed(
    journal: &Journal,
    request: &ExecuteStepRequest,
    why: &str,
) -> ExecuteStepResponse {
    let has_begun = journal.read(|memory| memory.begun(&StepKey::of(request)).is_some());
    let outcome = match has_begun {
        true => StepOutcome::Uncertain,
        false => StepOutcome::NoEffect,
    };
    response(outcome, why)
}

pub fn response(outcome: StepOutcome, message: &str) -> ExecuteStepResponse {
    ExecuteStepResponse {
        outcome: outcome.into(),
        message: message.to_owned(),
        ..ExecuteStepResponse::default()
    }
}

fn node_of(request: &ExecuteStepRequest) -> Result<&str, Status> {
    let node_id = match &request.act {
        Some(Act::Probe(it)) => &it.node_id,
        Some(Act::EnsureUsers(it)) => &it.node_id,
        Some(Act::HandOver(it)) => &it.node_id,
        Some(Act::TakeBack(it)) => &it.node_id,
        Some(Act::Promote(it)) => &it.node_id,
        Some(Act::StageEngine(it)) => &it.node_id,
        None => return Err(Status::invalid_argument("act: one must be set")),
    };
    if request.task_id.is_empty() || request.step.is_empty() {
        return Err(Status::invalid_argument("task_id and step: must be set"));
    }
    if request.term == 0 {
        return Err(Status::invalid_argument("term: must be set"));
    }
    if !is_id(node_id) {
        return Err(Status::invalid_argument("node_id: not an id"));
    }
    Ok(node_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::record::Begun;

    #[tokio::test]
    async fn a_step_that_has_begun_is_never_said_to_be_without_effect() {
        let dir = tempfile::tempdir().unwrap();
        let journal = Journal::open(dir.path()).unwrap();
        let request = ExecuteStepRequest {
            task_id: "t".into(),
            step: "0/hand-over".into(),
            attempt: 7,
            ..ExecuteStepRequest::default()
        };
        let answer = |attempt| {
            let request = ExecuteStepRequest {
                attempt,
                ..request.clone()
            };
            not_executed(&journal, &request, "why").outcome()
        };
        assert_eq!(answer(7), StepOutcome::NoEffect);
        let begun = Begun {
            request: request.clone(),
            deadline_unix_ms: 1,
        };
        journal.append([Fact::Begun(begun)]).await.unwrap();
        assert_eq!(answer(7), StepOutcome::Uncertain);
        assert_eq!(answer(8), StepOutcome::NoEffect);
    }
}
