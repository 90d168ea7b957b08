// A picture from the camera: in a dialog where the browser lets a page see the camera, else by the phone's own app.

const find = (id) => document.getElementById(id);

async function shoot(video) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d").drawImage(video, 0, 0);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
  return new File([blob], "camera.jpg", { type: blob.type });
}

/** Let the camera's button give a picture to `take`, or a reason to `fail`. */
export function useCamera(take, fail) {
  let asked = false; // of two streams the first would film on unseen
  const [button, dialog, video] = ["camera", "viewfinder", "video"].map(find);
  const allowed = Boolean(navigator.mediaDevices?.getUserMedia); // browsers give it to secure addresses only
  button.hidden = !allowed && !matchMedia("(pointer: coarse)").matches;
  button.addEventListener("click", async () => {
    if (!allowed) return find("capture").click();
    if (asked) return;
    asked = true; // the button keeps the focus, which a disabled one would lose
    try {
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch {
      return fail("The camera cannot be used", "There is none, or the browser was told not to lend it to this page.");
    } finally {
      asked = false;
    }
    find("shoot").disabled = true; // until there is something to take
    dialog.showModal();
    await video.play().catch(() => {}); // the dialog was closed before the first picture came
    find("shoot").disabled = !video.videoWidth;
  });
  find("shoot").addEventListener("click", async () => {
    const file = await shoot(video);
    dialog.close();
    take([{ file, name: file.name }]);
  });
  dialog.addEventListener("close", () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
  });
}
