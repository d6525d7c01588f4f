//! Sequential code in virtual time: a future that is polled whenever something happened to its
//! party. A crash drops it in the middle.
//!
//! Invariant: nothing wakes a fiber but events of its party, so its steps are of the seed.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use crate::{
    ctx::Ctx,
    msg::{Party, Timer},
    sched::Micros,
};

/// The world, as fibers see it.
pub type World = Rc<RefCell<Ctx>>;

/// See the module.
pub struct Fiber(Pin<Box<dyn Future<Output = ()>>>);

impl std::fmt::Debug for Fiber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Fiber")
    }
}

impl Fiber {
    /// Nothing happens before it is polled.
    pub fn new(future: impl Future<Output = ()> + 'static) -> Self {
        Self(Box::pin(future))
    }

    /// Goes on as far as it can; true when it has ended.
    pub fn poll(&mut self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        self.0.as_mut().poll(&mut context).is_ready()
    }
}

/// Answers to calls, by their number.
#[derive(Debug)]
pub struct Answers<T>(Rc<RefCell<BTreeMap<u64, T>>>);

impl<T> Clone for Answers<T> {
    fn clone(&self) -> Self {
        Self(Rc::clone(&self.0))
    }
}

impl<T> Default for Answers<T> {
    fn default() -> Self {
        Self(Rc::default())
    }
}

impl<T> Answers<T> {
    /// An answer has come.
    pub fn put(&self, call: u64, answer: T) {
        self.0.borrow_mut().insert(call, answer);
    }

    /// Waits for the answer, but not longer than `limit`.
    pub async fn get(&self, world: &World, me: Party, call: u64, limit: Micros) -> Option<T> {
        let until = {
            let mut ctx = world.borrow_mut();
            ctx.timer(me, limit, Timer::Call(call));
            ctx.now() + limit
        };
        std::future::poll_fn(|_| {
            if let Some(answer) = self.0.borrow_mut().remove(&call) {
                return Poll::Ready(Some(answer));
            }
            if world.borrow().now() >= until {
                Poll::Ready(None)
            } else {
                Poll::Pending
            }
        })
        .await
    }
}

/// Waits.
pub async fn sleep(world: &World, me: Party, time: Micros) {
    wait_until(world, me, time, || false).await;
}

/// Waits for a condition, but not longer than `limit`; true if it came.
pub async fn wait_until(
    world: &World,
    me: Party,
    limit: Micros,
    condition: impl Fn() -> bool,
) -> bool {
    let until = {
        let mut ctx = world.borrow_mut();
        ctx.timer(me, limit, Timer::Call(0));
        ctx.now() + limit
    };
    std::future::poll_fn(|_| {
        if condition() {
            return Poll::Ready(true);
        }
        if world.borrow().now() >= until {
            Poll::Ready(false)
        } else {
            Poll::Pending
        }
    })
    .await
}
