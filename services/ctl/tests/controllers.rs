//! The ctl against controllers that misbehave: streams that break, and one that does not lead.

#![allow(clippy::unwrap_used)]

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use slotmesh_ctl::{
    api::Api,
    failure::Failure,
    progress::{self, Watcher},
};
use slotmesh_proto::{
    store::v1::TaskState,
    task::v1::{
        CancelTaskRequest, CancelTaskResponse, GetTaskRequest, GetTaskResponse, ListEpochsRequest,
        ListEpochsResponse, ListLostWritesRequest, ListLostWritesResponse, ListTasksRequest,
        ListTasksResponse, RescheduleTaskRequest, RescheduleTaskResponse, ResolveTaskRequest,
        ResolveTaskResponse, Task, TaskEvent, WatchTaskRequest, WatchTaskResponse,
        task_service_server::{TaskService, TaskServiceServer},
    },
};
use tokio::net::TcpListener;
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Code, Request, Response, Status, transport::Server};
use tonic_types::{ErrorDetails, StatusExt};

type Answers = Vec<Result<WatchTaskResponse, Status>>;

/// A controller whose task has five events; each of its streams breaks after two of them.
#[derive(Debug, Clone, Default)]
struct Controller {
    leader: Option<String>,
    asked_from: Arc<Mutex<Vec<u64>>>,
    /// So many calls more are lost with the leader.
    lost: Arc<Mutex<u32>>,
    /// Client tokens and `traceparent`s of cancels, as they came.
    cancels: Arc<Mutex<Vec<(String, String)>>>,
}

const EVENTS: u64 = 5;
const EVENTS_PER_STREAM: u64 = 2;

impl Controller {
    /// Serves until the test's runtime ends, and says where.
    async fn serve(self) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::builder().add_service(TaskServiceServer::new(self));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    /// As a controller says it whose leader died with the call.
    fn lose(&self) -> Result<(), Status> {
        let mut lost = self.lost.lock().unwrap();
        if *lost == 0 {
            return Ok(());
        }
        *lost -= 1;
        let details = ErrorDetails::with_error_info("LEADER_LOST", "slotmesh", []);
        let message = "the leader was lost while it had this call";
        Err(Status::with_error_details(
            Code::Unavailable,
            message,
            details,
        ))
    }

    fn require_leader(&self) -> Result<(), Status> {
        let Some(leader) = &self.leader else {
            return Ok(());
        };
        let metadata = [("leader".to_owned(), leader.clone())];
        let details = ErrorDetails::with_error_info("NOT_LEADER", "slotmesh", metadata);
        Err(Status::with_error_details(
            Code::Unavailable,
            "ask the leader",
            details,
        ))
    }
}

#[tonic::async_trait]
impl TaskService for Controller {
    type WatchTaskStream = Pin<Box<dyn Stream<Item = Result<WatchTaskResponse, Status>> + Send>>;

    async fn watch_task(
        &self,
        request: Request<WatchTaskRequest>,
    ) -> Result<Response<Self::WatchTaskStream>, Status> {
        self.require_leader()?;
        let from = request.into_inner().from_event;
        self.asked_from.lock().unwrap().push(from);
        let last = EVENTS.min(from + EVENTS_PER_STREAM - 1);
        let mut answers: Answers = (from..=last)
            .map(|number| {
                let event = Some(TaskEvent {
                    number,
                    ..TaskEvent::default()
                });
                Ok(WatchTaskResponse { event, task: None })
            })
            .collect();
        if last < EVENTS {
            answers.push(Err(Status::unavailable("the connection broke")));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(answers))))
    }

    async fn get_task(
        &self,
        request: Request<GetTaskRequest>,
    ) -> Result<Response<GetTaskResponse>, Status> {
        self.require_leader()?;
        self.lose()?;
        let task_id = request.into_inner().task_id;
        if task_id != "t-1" {
            return Err(Status::not_found(format!("task {task_id} does not exist")));
        }
        let task = Task {
            task_id,
            state: TaskState::Done.into(),
            ..Task::default()
        };
        Ok(Response::new(GetTaskResponse { task: Some(task) }))
    }

    async fn list_tasks(
        &self,
        _: Request<ListTasksRequest>,
    ) -> Result<Response<ListTasksResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn cancel_task(
        &self,
        request: Request<CancelTaskRequest>,
    ) -> Result<Response<CancelTaskResponse>, Status> {
        let parent = request.metadata().get("traceparent");
        let parent = parent.map(|p| p.to_str().unwrap().to_owned());
        let token = request.into_inner().client_token;
        let cancel = (token, parent.unwrap_or_default());
        self.cancels.lock().unwrap().push(cancel);
        self.lose()?;
        Ok(Response::new(CancelTaskResponse::default()))
    }

    async fn reschedule_task(
        &self,
        _: Request<RescheduleTaskRequest>,
    ) -> Result<Response<RescheduleTaskResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn resolve_task(
        &self,
        _: Request<ResolveTaskRequest>,
    ) -> Result<Response<ResolveTaskResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn list_epochs(
        &self,
        _: Request<ListEpochsRequest>,
    ) -> Result<Response<ListEpochsResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn list_lost_writes(
        &self,
        _: Request<ListLostWritesRequest>,
    ) -> Result<Response<ListLostWritesResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}

/// Keeps the numbers that it was shown.
#[derive(Debug, Default)]
struct Numbers(Vec<u64>);

impl Watcher for Numbers {
    fn event(&mut self, event: &TaskEvent, _: Option<&Task>) -> Result<(), Failure> {
        self.0.push(event.number);
        Ok(())
    }
}

#[tokio::test]
async fn a_broken_stream_is_resumed_after_the_last_event_and_shows_each_event_once() {
    let controller = Controller::default();
    let asked_from = controller.asked_from.clone();
    let mut api = Api::connect(&controller.serve().await).await.unwrap();
    let mut numbers = Numbers::default();
    let task = progress::watch(&mut api, "t-1", 1, &mut numbers)
        .await
        .unwrap();
    assert_eq!(task.state(), TaskState::Done);
    assert_eq!(numbers.0, [1, 2, 3, 4, 5]);
    assert_eq!(*asked_from.lock().unwrap(), [1, 3, 5]);
}

#[tokio::test]
async fn a_controller_that_does_not_lead_sends_the_caller_to_the_leader() {
    let leader = Controller::default().serve().await;
    let follower = Controller {
        leader: Some(leader.clone()),
        ..Controller::default()
    };
    let mut api = Api::connect(&follower.serve().await).await.unwrap();
    assert_eq!(api.task("t-1").await.unwrap().state(), TaskState::Done);
    assert_eq!(api.address(), leader);
}

#[tokio::test]
async fn two_controllers_that_point_at_each_other_are_not_followed_for_ever() {
    let nobody = Controller {
        leader: Some("127.0.0.1:1".into()),
        ..Controller::default()
    };
    let first = nobody.serve().await;
    let second = Controller {
        leader: Some(first),
        ..Controller::default()
    };
    let mut api = Api::connect(&second.serve().await).await.unwrap();
    let failure = api.task("t-1").await.expect_err("nobody leads");
    assert_eq!(failure.reason(), Some("NOT_LEADER"), "{failure}");
}

#[tokio::test]
async fn an_unknown_task_is_refused_at_once() {
    let mut api = Api::connect(&Controller::default().serve().await)
        .await
        .unwrap();
    let failure = api.task("t-2").await.expect_err("unknown");
    assert!(
        matches!(
            failure,
            Failure::Refused {
                code: Code::NotFound,
                ..
            }
        ),
        "{failure}"
    );
}

/// With so many calls that are lost.
fn losing(calls: u32) -> Controller {
    Controller {
        lost: Arc::new(Mutex::new(calls)),
        ..Controller::default()
    }
}

#[tokio::test]
async fn a_command_whose_leader_is_lost_asks_again_at_another_controller_with_the_same_token() {
    let (first, second) = (losing(9), Controller::default());
    let (asked, asked_again) = (first.cancels.clone(), second.cancels.clone());
    let addresses = format!("{},{}", first.serve().await, second.serve().await);
    let limit = Duration::from_secs(10);
    let mut api = Api::patient(&addresses, limit).await.unwrap();
    let request = CancelTaskRequest {
        task_id: "t-1".into(),
        client_token: Api::token(None),
    };
    api.call(|api| {
        let request = request.clone();
        async move { api.tasks().cancel_task(request).await }
    })
    .await
    .unwrap();
    let (asked, asked_again) = (asked.lock().unwrap(), asked_again.lock().unwrap());
    assert_eq!((asked.len(), asked_again.len()), (1, 1));
    assert_eq!(asked[0], asked_again[0], "the same token, the same trace");
    assert!(!asked[0].0.is_empty());
    assert!(asked[0].1.contains(api.trace_id()) && api.trace_id().len() == 32);
}

#[tokio::test]
async fn a_command_asks_its_only_controller_again_but_not_for_ever() {
    let limit = Duration::from_secs(1);
    let once = losing(1).serve().await;
    let mut api = Api::patient(&once, limit).await.unwrap();
    assert_eq!(api.task("t-1").await.unwrap().state(), TaskState::Done);

    let always = losing(u32::MAX).serve().await;
    let mut api = Api::patient(&always, limit).await.unwrap();
    let began = Instant::now();
    let failure = api.task("t-1").await.expect_err("it is lost every time");
    assert_eq!(failure.reason(), Some("LEADER_LOST"), "{failure}");
    assert!(began.elapsed() < limit + Duration::from_secs(5));
}

#[tokio::test]
async fn a_command_finds_the_controller_that_answers_among_those_that_it_was_given() {
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = dead.local_addr().unwrap();
    drop(dead);
    let well = Controller::default().serve().await;
    let addresses = format!("{nobody}, {well}");
    let mut api = Api::patient(&addresses, Duration::ZERO).await.unwrap();
    assert_eq!(api.task("t-1").await.unwrap().state(), TaskState::Done);
    // What asks once is told at once.
    let mut once = Api::connect(&losing(1).serve().await).await.unwrap();
    let failure = once.task("t-1").await.expect_err("lost");
    assert_eq!(failure.reason(), Some("LEADER_LOST"));
}
