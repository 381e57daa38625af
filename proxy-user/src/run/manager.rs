//! Notifications to systemd, if systemd started the agent.
//!
//! In: health. Out: READY once Services are in force, because a unit of type `notify` has then started; WATCHDOG while no change
//! is late; and STOPPING. Without systemd there is no socket, and nothing is sent.

use sd_notify::NotifyState;

use crate::observe::Health;

/// Notifies until the process ends.
pub(super) async fn follow(health: Health) {
    let ready = async {
        health.serves().await;
        tell(&[NotifyState::Ready, NotifyState::Status("Services are in force")]);
    };
    tokio::join!(ready, live(&health));
}

/// Sends STOPPING.
pub(super) fn ending() {
    tell(&[NotifyState::Stopping, NotifyState::Status("what is programmed stays in the kernel")]);
}

/// Sends WATCHDOG, also before Services are in force: after `exec` systemd's watchdog keeps running.
async fn live(health: &Health) {
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else { return };
    let mut signs = tokio::time::interval(limit / 2);
    signs.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        signs.tick().await;
        if health.healthy() {
            tell(&[NotifyState::Watchdog]);
        }
    }
}

fn tell(news: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(news) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}
