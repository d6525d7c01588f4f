//! Carries the calls of workers: to their peers, or to a controller.
//!
//! Invariant: every call is answered exactly once, within `CALL_LIMIT`.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use slotmesh_acl::Users;
use slotmesh_proto::instance::v1 as pb;
use slotmesh_proto::instance::v1::instance_service_client::InstanceServiceClient;
use slotmesh_proto::topology::v1::Account;
use slotmesh_resp::write;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use crate::controllers::Controllers;
use crate::core::call::{Call, PeerRequest};
use crate::routing::{InstanceSettings, Routing};
use crate::worker::{Question, WorkerHandle};

/// Longest time that a command of an operator waits for an answer: a leader may just be elected.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// One worker's part of an answer; a turn takes far less.
const PEER_LIMIT: Duration = Duration::from_secs(1);
/// One controller's: past it the next one is asked.
const CONTROLLER_LIMIT: Duration = Duration::from_secs(2);
/// How long the answer waits for the own topology, which follows in milliseconds.
const CAUGHT_UP_LIMIT: Duration = Duration::from_millis(500);
/// How often it is looked whether the own topology has caught up, or a full inbox has room.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

const TOO_LATE: &[u8] = b"-ERR slotmesh: no controller answered in time; try again\r\n";

/// See the module.
#[derive(Debug)]
pub struct Switchboard {
    pub instance: String,
    pub controllers: Controllers,
    pub routing: Arc<Routing>,
    pub workers: Arc<Vec<WorkerHandle>>,
}

impl Switchboard {
    /// Serves until told to stop.
    pub async fn run(self, mut questions: mpsc::Receiver<Question>, stop: CancellationToken) {
        let board = Arc::new(self);
        let mut open = tokio::task::JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(_) = open.join_next() => {}
                question = questions.recv() => {
                    let Some(question) = question else { return };
                    let board = Arc::clone(&board);
                    open.spawn(async move { board.serve(question).await });
                }
            }
        }
    }

    async fn serve(&self, question: Question) {
        let Question {
            worker,
            ticket,
            call,
        } = question;
        let answer = match call {
            Call::Peers(request) => self.ask_peers(&request).await,
            call => match timeout(CALL_LIMIT, self.ask_controllers(&call)).await {
                Ok(answer) => answer,
                Err(_) => TOO_LATE.to_vec(),
            },
        };
        while !self.workers[worker].answer(ticket, answer.clone()) {
            sleep_until(Instant::now() + LOOK_AGAIN).await; // there is room once it has turned
        }
    }

    async fn ask_peers(&self, request: &PeerRequest) -> Vec<u8> {
        let asked: Vec<_> = (self.workers.iter())
            .map(|worker| worker.ask(request.clone()))
            .collect();
        let mut reply = Vec::new();
        write::write_array_header(&mut reply, asked.len());
        for answered in asked {
            let answer = match answered {
                Some(answered) => timeout(PEER_LIMIT, answered).await.ok(),
                None => None,
            };
            match answer {
                Some(Ok(answer)) => reply.extend_from_slice(&answer),
                _ => write::write_error(&mut reply, "ERR slotmesh: a worker is too busy to answer"),
            }
        }
        reply
    }

    /// Asks one controller after the other until one has decided.
    async fn ask_controllers(&self, call: &Call) -> Vec<u8> {
        let mut problem = "there is none to ask".to_owned();
        for controller in &self.controllers.addresses() {
            match timeout(CONTROLLER_LIMIT, self.ask_controller(controller, call)).await {
                Ok(Ok(())) => {
                    self.caught_up(call).await;
                    return b"+OK\r\n".to_vec();
                }
                Ok(Err(status)) if is_final(&status) => {
                    return error_reply(status.message());
                }
                Ok(Err(status)) => problem = status.message().to_owned(),
                Err(_) => problem = "it did not answer in time".to_owned(),
            }
        }
        error_reply(&format!("ERR slotmesh: the controller: {problem}"))
    }

    async fn ask_controller(&self, controller: &str, call: &Call) -> Result<(), tonic::Status> {
        let mut client = InstanceServiceClient::new(connect(controller).await?);
        let instance_id = self.instance.clone();
        match call {
            Call::Peers(_) => {}
            Call::Accounts { set, removed } => {
                let account = |(name, rules): &(String, Vec<String>)| Account {
                    name: name.clone(),
                    rules: rules.clone(),
                };
                let request = pb::UpdateAccountsRequest {
                    instance_id,
                    accounts: set.iter().map(account).collect(),
                    removed: removed.clone(),
                    ..pb::UpdateAccountsRequest::default()
                };
                client.update_accounts(request).await?;
            }
            Call::Parameters { engine, proxy } => {
                let request = pb::UpdateParametersRequest {
                    instance_id,
                    engine: engine.iter().cloned().collect::<HashMap<_, _>>(),
                    proxy: proxy.iter().cloned().collect::<HashMap<_, _>>(),
                    ..pb::UpdateParametersRequest::default()
                };
                client.update_parameters(request).await?;
            }
        }
        Ok(())
    }

    /// Waits until this process has what was stored, so that who changed something sees it. Not for
    /// long: another change may have come over it, or the stream to the controller is down.
    async fn caught_up(&self, call: &Call) {
        let until = Instant::now() + CAUGHT_UP_LIMIT;
        while !has(&self.routing.load().settings, call) && Instant::now() < until {
            sleep_until(Instant::now() + LOOK_AGAIN).await;
        }
    }
}

/// True if these settings are as the call wants them. Engine parameters are not among them: nodes have
/// them before the controller answers.
fn has(settings: &InstanceSettings, call: &Call) -> bool {
    match call {
        Call::Peers(_) => true,
        Call::Accounts { set, removed } => {
            let accounts = set.iter().map(|(name, rules)| (name.as_str(), rules));
            let Ok(wanted) = Users::new(accounts, None) else {
                return true; // it will never be readable
            };
            let name_of = |(name, _): &(String, Vec<String>)| name.as_bytes().to_vec();
            let mut names = set.iter().map(name_of);
            names.all(|name| settings.users.get(&name) == wanted.get(&name))
                && (removed.iter()).all(|name| settings.users.get(name.as_bytes()).is_none())
        }
        Call::Parameters { proxy, .. } => proxy.iter().all(|(name, value)| {
            let known = settings
                .proxy_parameters
                .get(name)
                .map_or("", String::as_str);
            known == value
        }),
    }
}

async fn connect(controller: &str) -> Result<Channel, tonic::Status> {
    let unavailable =
        |error: tonic::transport::Error| tonic::Status::unavailable(error.to_string());
    let endpoint = Endpoint::from_shared(format!("http://{controller}")).map_err(unavailable)?;
    let endpoint = endpoint.tcp_nodelay(true).connect_timeout(PEER_LIMIT);
    endpoint.connect().await.map_err(unavailable)
}

/// True if another controller would say the same.
fn is_final(status: &tonic::Status) -> bool {
    use tonic::Code;
    matches!(
        status.code(),
        Code::InvalidArgument | Code::NotFound | Code::AlreadyExists | Code::ResourceExhausted
    )
}

/// An error reply; an engine's own words are given on as they are.
fn error_reply(text: &str) -> Vec<u8> {
    let mut reply = Vec::new();
    let first = text.split(' ').next().unwrap_or_default();
    let has_code = !first.is_empty() && first.bytes().all(|b| b.is_ascii_uppercase());
    let text = if has_code {
        text.to_owned()
    } else {
        format!("ERR {text}")
    };
    write::write_error(&mut reply, text.replace(['\r', '\n'], " "));
    reply
}
